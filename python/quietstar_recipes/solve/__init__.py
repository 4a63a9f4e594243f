"""Compare uses of more tokens on test problems: votes, best of k, search, revisions."""

from quietstar_recipes.solve.command import Solve
from quietstar_recipes.solve.run import Config, draw, solve

__all__ = ["Config", "Solve", "draw", "solve"]
