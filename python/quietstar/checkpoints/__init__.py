"""Checkpoints: the project's own and the published ones."""
