"""Quiet-STaR for any Hugging Face causal language model: wrapper, training, evaluation.

The dimension key of shapes in docstrings and errors is in ``quietstar_kernels``. A name is imported when it is first used.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

# The module of each public name, from the list that type checkers read.
_IMPORTS = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_MODULES = {x.name: node.module for node in _IMPORTS if isinstance(node, ast.ImportFrom) for x in node.names}

# What the train extra installs, by the names of modules; the kernels do without.
NEEDED = {"transformers", "tokenizers", "accelerate", "safetensors", "tqdm", "numpy", "tyro", "yaml", "msgspec", "psutil"}

__all__ = sorted(name for name in _MODULES if not name.startswith("_"))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'quietstar' has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        text = f"quietstar.{name} needs {error.name}, of the train extra: pip install -e '.[train]' in a checkout"
        raise ModuleNotFoundError(text, name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
