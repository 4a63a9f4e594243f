"""STaR with a verifier, which learns from right and wrong solutions (V-STaR)."""

from quietstar_recipes.vstar.command import VStar
from quietstar_recipes.vstar.run import Config, draw, vstar

__all__ = ["Config", "VStar", "draw", "vstar"]
