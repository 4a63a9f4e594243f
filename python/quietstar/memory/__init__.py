"""Estimates of the memory and traffic that a training step needs, before it runs."""
