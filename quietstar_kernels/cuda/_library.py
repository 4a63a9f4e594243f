"""The compiled library, next to this file: loaded once, and asked what it was built for.

One library serves all versions of Python, and PyTorch from 2.10 on, so nothing is compiled at installation.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

import torch

from ..cpu._library import why_missing

FILE = Path(__file__).parent / "_C.abi3.so"
PURE = "this install has none; build it with QUIETSTAR_BUILD=cuda, which needs nvcc"


@functools.cache
def _load() -> ctypes.CDLL:
    """Registers its functions with PyTorch. Raises OSError."""
    torch.ops.load_library(FILE)
    library = ctypes.CDLL(str(FILE))  # the same one again, which only adds a reference
    library.quietstar_built_for.restype = library.quietstar_cuda_error.restype = ctypes.c_char_p
    return library


def ops() -> Any:
    """The namespace of the private functions, ``_thought_decode_cuda`` and ``_sample_token_cuda``."""
    _load()
    return torch.ops.quietstar_kernels


@functools.cache
def built_for() -> tuple[str, tuple[str, ...]]:
    """The version of the toolkit, and the architectures: "sm_90a" is machine code, "compute_80" is PTX."""
    toolkit, *architectures = _load().quietstar_built_for().decode().split()
    return toolkit, tuple(architectures)


@functools.cache
def missing() -> str | None:
    """None if there is a library and it loads; else the reason, in words."""
    return why_missing(FILE, PURE, _load)


def cuda_library() -> str:
    """One line: which library the CUDA back end has loaded and what it was built for, or why it has none."""
    if reason := missing():
        return f"no CUDA library: {reason}"
    toolkit, architectures = built_for()
    return f"CUDA library {FILE}, built with CUDA {toolkit} for {', '.join(architectures)}"


def why_not(device: torch.device) -> str | None:
    """None if the library runs on ``device``; else the reason, in words."""
    if reason := missing():
        return reason
    if device.type != "cuda":
        return f"no CUDA device: these tensors are on {device}"
    return _why_not_gpu(device)


# torch.compile must not trace how the library is found and asked. torch.compiler.assume_constant_result does the same, but it
# imports the compiler.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_not_gpu(device: torch.device) -> str | None:
    if torch.version.hip:
        return "it is for NVIDIA GPUs"
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device} here"
    toolkit, architectures = built_for()
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs(name, capability) for name in architectures):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, it was built for {', '.join(architectures)}"
    if error := _load().quietstar_cuda_error():
        return f"it was built with CUDA {toolkit}, and CUDA says: {error.decode()}"
    return None


def _runs(name: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU.

    Machine code runs on later GPUs of the same generation, PTX on all later ones. With an "a" both run only on that GPU, with
    an "f" only on its generation.
    """
    kind, major, minor, only = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name).groups()  # type: ignore[union-attr]
    oldest = (int(major), int(minor))
    if only == "a":
        return capability == oldest
    return capability >= oldest and (capability[0] == oldest[0] or (kind == "compute" and not only))
