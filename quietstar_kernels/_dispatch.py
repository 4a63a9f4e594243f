"""Which back end serves an op on a device, and why another one can't. Only ``backend="auto"`` chooses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any

import torch

OPS = ("thought_attention", "thought_decode", "sample_token", "linear_logprob")
BACKENDS = ("reference", "cpu", "triton", "cuda")


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """None where ``backend`` serves ``op`` on ``device``, else the reason in words."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device.type == "cpu" else f"it serves tensors on cpu, these are on {device}"
    if importlib.util.find_spec(f"quietstar_kernels.{backend}") is None:
        return "it is not part of this version"
    return f"it does not serve {op} on {device}"


def choose(op: str, backend: str, device: torch.device) -> str:
    """The name of the back end to run. Raises ValueError for one that was named and can't run."""
    if backend == "auto":
        backend = os.environ.get("QUIETSTAR_BACKEND", "auto")
    if backend == "auto":
        if device.type in ("cpu", "meta"):
            return "cpu"
        _warn_dense(op, str(device))
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(op, backend, device)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} is not available: {reason}")
    return backend


@functools.cache
def _warn_dense(op: str, device: str) -> None:
    warnings.warn(
        f"{op}: no fast back end for {device} in this version, backend='auto' runs 'reference', which is dense and slow",
        stacklevel=4,
    )


def module(op: str, backend: str) -> ModuleType:
    """The module that holds ``op`` and, where it has one, ``op_backward`` for a back end that ``choose`` returned."""
    name = "reference" if backend == "reference" else f"{backend}.{op}"
    return importlib.import_module(f"quietstar_kernels.{name}")


def run(function: str, backend: str, *arguments: Any) -> Any:
    """Call an op's function, such as "thought_attention_backward". Back ends choose their own precision: autocast is off."""
    serve = getattr(module(function.removesuffix("_backward"), backend), function)
    with torch.autocast(arguments[0].device.type, enabled=False):
        return serve(*arguments)


def backends(device: torch.device | str = "cpu") -> list[dict[str, str]]:
    """One row per op and back end: ``{"op", "backend", "status"}``; status is "available" or the reason why not."""
    device = torch.device(device)
    return [
        {"op": op, "backend": backend, "status": why_not(op, backend, device) or "available"}
        for op in OPS
        for backend in BACKENDS
    ]
