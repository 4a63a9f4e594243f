"""Other implementations of what this package does, each called the way its own documentation shows."""
