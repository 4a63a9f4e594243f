"""Quiet-STaR for any Hugging Face causal language model: wrapper, rollout, objective.

The dimension key of shapes in docstrings and errors is in ``quietstar_kernels``.
"""

import quietstar._moved  # noqa: F401  old module names: errors that give the new ones
from quietstar.config import ThoughtConfig
from quietstar.explain.report import Report
from quietstar.hf.attention import register_attention
from quietstar.hf.verify import VerifyReport, verify
from quietstar.model import QuietStar
from quietstar.output import QuietStarOutput
from quietstar.packed import Thinker
from quietstar.rollout import Thoughts

__all__ = [
    "QuietStar",
    "QuietStarOutput",
    "Report",
    "Thinker",
    "ThoughtConfig",
    "Thoughts",
    "VerifyReport",
    "register_attention",
    "verify",
]
