"""Teach a model to correct its own answers, by reinforcement learning (SCoRe)."""

from quietstar_recipes.score.run import Config, Score, score

__all__ = ["Config", "Score", "score"]
