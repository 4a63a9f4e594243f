"""CUDA kernels for NVIDIA GPUs from sm_80 on, compiled from csrc/ when the package is built."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _library, sample_token, thought_decode

# By op, for a dtype and widths: None, or why it isn't served.
SERVES: dict[str, Callable[..., str | None]] = {"thought_decode": thought_decode.serves, "sample_token": sample_token.serves}


def why_not(op: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """Implements ``_dispatch.why_not``."""
    if op not in SERVES:
        return f"it has no kernel for {op}"
    reason = _library.why_not(device)
    return reason if reason or dtype is None else SERVES[op](dtype, **widths)
