"""Quiet-STaR for any Hugging Face causal language model: wrapper, rollout, objective.

The dimension key of shapes in docstrings and errors is in ``quietstar_kernels``.
"""

from quietstar.attention import register_attention
from quietstar.config import ThoughtConfig
from quietstar.explain import Report
from quietstar.model import QuietStar, QuietStarOutput
from quietstar.rollout import Thoughts
from quietstar.verify import VerifyReport, verify

__all__ = [
    "QuietStar",
    "QuietStarOutput",
    "Report",
    "ThoughtConfig",
    "Thoughts",
    "VerifyReport",
    "register_attention",
    "verify",
]
