"""V-STaR: STaR with a verifier, which learns from right and wrong solutions."""

from quietstar_recipes.vstar.run import Config, VStar, draw, vstar

__all__ = ["Config", "VStar", "draw", "vstar"]
