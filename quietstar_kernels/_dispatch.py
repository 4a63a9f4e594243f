"""Which back end serves an op on a device, and why another one can't. Only ``backend="auto"`` chooses."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from quietstar_kernels import _first_use
from quietstar_kernels.cuda import _library, sample_token, thought_decode

OPS = ("thought_attention", "thought_decode", "sample_token", "linear_logprob")
BACKENDS = ("reference", "cpu", "triton", "cuda")
Serves = Callable[..., str | None]  # of a dtype and widths: None, or why not
CUDA_SERVES: dict[str, Serves] = {"thought_decode": thought_decode.serves, "sample_token": sample_token.serves}
FASTEST_FIRST = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": ("cuda", "triton")}


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """None where ``backend`` serves ``op`` on ``device``, with ``dtype`` and ``widths`` where given; else why not, in words."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device.type in ("cpu", "meta") else f"it serves tensors on cpu, these are on {device}"
    if backend == "triton":
        return _why_not_triton(device, dtype)
    return _why_not_cuda(op, device, dtype, widths)


def _why_not_triton(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype == torch.float64:
        return "it does not compute in torch.float64"
    if device.type == "cuda":
        return _why_not_gpu(device)
    if device.type != "cpu":
        return f"it serves GPUs of NVIDIA and AMD, these tensors are on {device}"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("1", "true", "on"):
        return "it serves GPUs; on cpu only Triton's interpreter runs it, for tests: set TRITON_INTERPRET=1"
    return "Triton's interpreter computes torch.bfloat16 wrongly" if dtype == torch.bfloat16 else None


@functools.cache
def _why_not_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device} here"
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0 or later, {device} has {major}.{minor}"


def _why_not_cuda(op: str, device: torch.device, dtype: torch.dtype | None, widths: dict[str, int]) -> str | None:
    if op not in CUDA_SERVES:
        return f"it has no kernel for {op}"
    reason = _why_not_library(device)
    return reason if reason or dtype is None else CUDA_SERVES[op](dtype, **widths)


def _why_not_library(device: torch.device) -> str | None:
    return _library.why_not(device)


# torch.compile is not to trace how the library is found and asked. This is what torch.compiler.assume_constant_result does,
# but for importing the compiler.
_why_not_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str:
    """The name of the back end to run. Raises ValueError for one that was named and can't run.

    Args:
        widths: by letter, those on which it depends whether a back end serves the op, and which of its kernels does.
    """
    if backend == "auto":
        backend = os.environ.get("QUIETSTAR_BACKEND", "auto")
    if backend == "auto":
        reasons = []
        for name in FASTEST_FIRST.get(device.type, ()):
            reason = why_not(op, name, device, dtype, **widths)
            if reason is None and device.type in _first_use.TYPES:
                if torch.compiler.is_compiling():
                    reason = _first_use.found(op, name, device, dtype)
                else:
                    reason = _first_use.why_not(op, name, device, dtype, tuple(widths.items()), torch.is_grad_enabled())
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        _warn_dense(op, str(device), "; ".join(reasons))
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(op, backend, device, dtype, **widths)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} is not available: {reason}")
    return backend


@functools.cache
def _warn_dense(op: str, device: str, reasons: str) -> None:
    said = f" ({reasons})" if reasons else ""
    warnings.warn(
        f"{op}: no fast back end serves this on {device}{said}; backend='auto' runs 'reference', which is dense and slow",
        stacklevel=4,
    )


@functools.cache
def module(op: str, backend: str) -> ModuleType:
    """The module that holds ``op`` and, where it has one, ``op_backward`` for a back end that ``choose`` returned."""
    name = "reference" if backend == "reference" else f"{backend}.{op}"
    return importlib.import_module(f"quietstar_kernels.{name}")


def run(function: str, backend: str, *arguments: Any) -> Any:
    """Call an op's function, such as "thought_attention_backward", on the device of its first argument.

    Back ends choose their own precision: autocast is off.
    """
    serve = getattr(module(function.removesuffix("_backward").removesuffix("_joined"), backend), function)
    device = arguments[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    if not elsewhere and not torch.is_autocast_enabled(device.type):
        return serve(*arguments)
    here = torch.cuda.device(device) if elsewhere else contextlib.nullcontext()
    with here, torch.autocast(device.type, enabled=False):
        return serve(*arguments)


def backends(device: torch.device | str = "cpu") -> list[dict[str, str]]:
    """One row per op and back end: ``{"op", "backend", "status"}``; status is "available" or the reason why not."""
    device = torch.device(device)
    return [
        {"op": op, "backend": backend, "status": why_not(op, backend, device) or "available"}
        for op in OPS
        for backend in BACKENDS
    ]
