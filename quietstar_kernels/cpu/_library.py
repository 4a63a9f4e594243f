"""The compiled library, next to this file: loaded once, at the first call that can use it."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "_C.abi3.so"
PURE = "this install has none; build it with QUIETSTAR_BUILD=cpu, which needs a C++17 compiler"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _load() -> ctypes.CDLL:
    """Registers its functions with PyTorch. Raises OSError."""
    torch.ops.load_library(FILE)
    library = ctypes.CDLL(str(FILE))  # the same one again, which only adds a reference
    library.quietstar_cpu_kernels.restype = ctypes.c_char_p
    return library


def ops() -> Any:
    """The namespace of the compiled functions, one for each op."""
    return torch.ops.quietstar_kernels_cpu


@functools.cache
def missing() -> str | None:
    """None if there is a library and it loads; else the reason, in words."""
    return why_missing(FILE, PURE, _load)


def why_missing(file: Path, absent: str, load: Callable[[], object]) -> str | None:
    """``missing`` of a library: ``absent``, or what the loader says."""
    if not file.exists():
        return absent
    reason = None
    for _ in range(2):  # a shared disk may fail once, and the answer holds until the process ends
        try:
            load()
            return None
        except OSError as error:
            reason = f"its library does not load: {error}"
    return reason


def serves(dtype: torch.dtype) -> bool:
    """Whether compiled code computes in ``dtype`` here; if it would, but for the library, this says so once."""
    if dtype not in DTYPES:
        return False
    if missing():
        _warn_slow()
    return not missing()


def computes(dtype: torch.dtype, *inputs: Tensor | None) -> bool:
    """Whether compiled code computes a part of a layer of these dtypes; PyTorch does well without, so nothing is said."""
    return not missing() and dtype in DTYPES and all(x is None or x.dtype in DTYPES for x in inputs)


@functools.cache
def _warn_slow() -> None:
    get = "QUIETSTAR_BUILD=cpu pip install --no-build-isolation --no-deps -e ."
    warnings.warn(f"{cpu_library()}. In a checkout of the source, `{get}` builds it.", stacklevel=3)


def instruction_set() -> str | None:
    """The one whose code the library runs, such as "avx2"; None without a library."""
    return None if missing() else _load().quietstar_cpu_kernels().decode()


def cpu_library() -> str:
    """One line: which library the CPU back end has loaded and for which instructions, or why it runs in PyTorch alone."""
    if reason := missing():
        return f"no CPU library, so attention and decoding on CPUs run in PyTorch alone: {reason}"
    return f"CPU library {FILE}, running its code for {instruction_set()}"
