"""Train a model on its own chains of thought that lead to right answers (STaR)."""

from quietstar_recipes.star.command import Star
from quietstar_recipes.star.run import Config, star

__all__ = ["Config", "Star", "star"]
