"""Chooses the back end of a call. A back end that is named runs or raises; only ``backend="auto"`` looks for another."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from . import _first_use, cpu, cuda, reference, triton
from .checks import Checker, shown

OF_A_LAYER = ("rms_norm", "rotary", "rotary_decode", "gated_activation")  # elementwise: PyTorch alone is neither dense nor slow
OPS = ("thought_attention", "thought_decode", "sample_token", "linear_logprob", *OF_A_LAYER)
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}
FASTEST_FIRST = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": ("triton", "cuda")}


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """None if ``backend`` serves ``op`` on ``device``, with ``dtype`` and ``widths`` if given; else the reason, in words."""
    reason: str | None = BACKENDS[backend].why_not(op, device, dtype, **widths)
    return reason


def choose(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str:
    """The name of the back end to run. Raises ValueError for one that was named and can't run.

    Args:
        widths: sizes by letter, where it depends on them whether a back end serves the op, or with which kernel.
    """
    if isinstance(backend, str) and backend == "auto":
        backend = os.environ.get("QUIETSTAR_BACKEND", "auto")
        if backend == "auto" or (op in OF_A_LAYER and backend in ("cpu", "cuda")):  # which need not have these
            return _fastest(op, device, dtype, widths)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of auto, {', '.join(BACKENDS)}, got {shown(backend)}")
    reason = why_not(op, backend, device, dtype, **widths)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} is not available: {reason}")
    return backend


def _fastest(op: str, device: torch.device, dtype: torch.dtype | None, widths: dict[str, int]) -> str:
    """The first of ``FASTEST_FIRST`` that serves this and is right here; else the reference, with a warning."""
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
    if op not in OF_A_LAYER:
        _warn_dense(op, str(device), "; ".join(reasons))
    return "reference"


@functools.cache
def _warn_dense(op: str, device: str, reasons: str) -> None:
    because = f" ({reasons})" if reasons else ""
    warnings.warn(
        f"{op}: no fast back end serves this on {device}{because}; backend='auto' runs 'reference', which is dense and slow",
        stacklevel=5,
    )


@functools.cache
def module(op: str, backend: str) -> ModuleType:
    """The module that holds ``op`` and, where it has one, ``op_backward`` for a back end that ``choose`` returned."""
    name = "reference" if backend == "reference" else f"{backend}.{op}"
    return importlib.import_module(f".{name}", __package__)


def run(function: str, backend: str, *arguments: Any) -> Any:
    """Call an op's function, such as "thought_attention_backward", on the device of its first argument.

    Autocast is off: back ends choose their own precision.
    """
    serve = getattr(module(function.removesuffix("_backward"), backend), function)
    device = arguments[0].device
    kind = device.type
    elsewhere = kind == "cuda" and device.index != torch.cuda.current_device()
    if not elsewhere and not torch.is_autocast_enabled(kind):
        return serve(*arguments)
    here = torch.cuda.device(device) if elsewhere else contextlib.nullcontext()
    with here, torch.autocast(kind, enabled=False):
        return serve(*arguments)


def backends(device: torch.device | str = "cpu") -> list[dict[str, str]]:
    """One row per op and back end: ``{"op", "backend", "status"}``. The status is "available", or the reason why it is not."""
    device = Checker("backends").device(device)
    return [
        {"op": op, "backend": backend, "status": why_not(op, backend, device) or "available"}
        for op in OPS
        for backend in BACKENDS
    ]
