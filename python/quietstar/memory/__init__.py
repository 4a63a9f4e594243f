"""The memory and traffic that a training step needs, worked out before it runs."""
