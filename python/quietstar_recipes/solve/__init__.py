"""What more tokens at test time buy: votes, best of k, search over steps, revisions."""

from quietstar_recipes.solve.run import Config, Solve, draw, solve

__all__ = ["Config", "Solve", "draw", "solve"]
