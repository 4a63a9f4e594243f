"""Triton kernels for NVIDIA GPUs from sm_80 on and for AMD GPUs; for tests, Triton's interpreter runs them on a CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os

import torch

AMD = ("gfx90a", "gfx942", "gfx950")  # others' registers are too few for the tiles

WIDEST = 16384  # row of a norm, which one program holds


def why_not(op: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """Implements ``_dispatch.why_not``. Does not import Triton."""
    if op in ("rotary", "rotary_decode") and widths.get("K", 0) % 2:
        return f"it halves heads, got an odd K={widths['K']}"
    if op == "rms_norm" and widths.get("D", 0) > WIDEST:
        return f"it takes rows of D up to {WIDEST}, got {widths['D']}"
    return _why_not(device, dtype)


def _why_not(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype == torch.float64:
        return "it does not compute in torch.float64"
    if device.type == "cuda":
        return _why_not_gpu(device)
    if device.type != "cpu":
        return f"it serves NVIDIA and AMD GPUs, these tensors are on {device}"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("1", "true", "on"):
        return "it serves GPUs; on cpu only Triton's interpreter runs it, for tests: set TRITON_INTERPRET=1"
    return "Triton's interpreter computes torch.bfloat16 wrongly" if dtype == torch.bfloat16 else None


_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in cuda/_library.py: torch.compile calls it


@functools.cache
def _why_not_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device} here"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if name in AMD else f"it needs one of {', '.join(AMD)}, {device} is {name}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0 or later, {device} has {major}.{minor}"


def gluon_is_on() -> bool:
    """Whether QUIETSTAR_GLUON asks for the kernels in Gluon. Raises ValueError if it is neither 0, the default, nor 1."""
    wanted = os.environ.get("QUIETSTAR_GLUON", "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"QUIETSTAR_GLUON must be 0 or 1, got {wanted!r}")
    return wanted == "1"


@functools.cache
def gluon_why_not(target: str, dtype: torch.dtype | None = None, K: int | None = None, E: int | None = None) -> str | None:
    """None if attention's kernels in Gluon serve GPUs of ``target`` with this dtype and widths; else the reason, in words."""
    if target != "sm_90":
        return f"they serve Hopper, sm_90, and this is {target}"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"they compute in 16 bits, not in {dtype}"
    if K != E or K not in (None, 64, 128):
        return f"they serve heads of 64 and of 128, got K {K} and E {E}"
    try:
        importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    except ImportError as error:
        return f"this Triton has no Gluon: {error}"
    return None


def gluon_why_not_on(device: torch.device, dtype: torch.dtype | None = None, K: int | None = None) -> str | None:
    """``gluon_why_not`` for a device on which Triton runs, which it imports."""
    from .configs import target

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return gluon_why_not(target(), dtype, K, K)
