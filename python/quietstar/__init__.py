"""Quiet-STaR for any Hugging Face causal language model: wrapper, rollout, objective.

The dimension key of shapes in docstrings and errors is in ``quietstar_kernels``.
"""

from typing import Any

import quietstar._moved  # noqa: F401  old module names: errors that give the new ones

# What the train extra installs, by the names of modules; kernels alone do without.
NEEDED = {"transformers", "tokenizers", "accelerate", "safetensors", "tqdm", "numpy", "tyro", "yaml", "msgspec", "psutil"}

try:
    from quietstar.config import ThoughtConfig
    from quietstar.explain.report import Report
    from quietstar.hf.attention import register_attention
    from quietstar.hf.verify import VerifyReport, verify
    from quietstar.model import QuietStar
    from quietstar.output import QuietStarOutput
    from quietstar.packed import Thinker
    from quietstar.rollout import Thoughts
except ModuleNotFoundError as error:
    if error.name not in NEEDED:
        raise
    missing = error.name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'quietstar' has no attribute {name!r}")
        text = f"quietstar.{name} needs {missing}, of the train extra: pip install 'quietstar-kernels[train]'"
        raise ModuleNotFoundError(text, name=missing)


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
