"""Back end for CPUs: no dense mask and no tensor of R*V. One file per op.

Attention and decoding run in a library compiled from csrc/cpu/. Where there is none, and in fp64, PyTorch runs them: ``plain``.
"""

from __future__ import annotations

import torch


def why_not(op: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """Implements ``_dispatch.why_not``."""
    return None if device.type in ("cpu", "meta") else f"it serves tensors on cpu, these are on {device}"
