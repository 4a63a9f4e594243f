"""Files: written whole, and read at one door."""
