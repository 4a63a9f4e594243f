"""Checkpoints: this project's format and the published one."""
