"""SCoRe: a model learns to correct its own answers, by reinforcement learning."""

from quietstar_recipes.score.run import Config, Score, score

__all__ = ["Config", "Score", "score"]
