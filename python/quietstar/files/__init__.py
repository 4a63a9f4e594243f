"""Files: written whole, and checked as they are read."""
