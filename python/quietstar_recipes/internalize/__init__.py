"""Train a model to answer without writing its chain of thought (ICoT)."""

from quietstar_recipes.internalize.command import Internalize
from quietstar_recipes.internalize.stepwise import Config, internalize

__all__ = ["Config", "Internalize", "internalize"]
