"""Checks of arguments and of configs' fields."""
