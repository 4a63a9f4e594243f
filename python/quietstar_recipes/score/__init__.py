"""Teach a model to correct its own answers, by reinforcement learning (SCoRe)."""

from quietstar_recipes.score.command import Score
from quietstar_recipes.score.run import Config, score

__all__ = ["Config", "Score", "score"]
