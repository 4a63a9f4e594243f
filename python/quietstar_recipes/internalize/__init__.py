"""Answers without a written chain of thought: removed token by token (``stepwise``), or distilled (``kd``)."""

from quietstar_recipes.internalize.command import Internalize
from quietstar_recipes.internalize.stepwise import Config, internalize

__all__ = ["Config", "Internalize", "internalize"]
