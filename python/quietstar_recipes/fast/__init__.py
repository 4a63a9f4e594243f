"""Fast Quiet-STaR: shorter and shorter thoughts, then none."""

from quietstar_recipes.fast.run import Config, Fast, fast

__all__ = ["Config", "Fast", "fast"]
