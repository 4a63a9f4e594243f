"""Train with shorter and shorter thoughts, then without any (Fast Quiet-STaR)."""

from quietstar_recipes.fast.command import Fast
from quietstar_recipes.fast.run import Config, fast

__all__ = ["Config", "Fast", "fast"]
