"""Back end for CPUs: no dense mask and no tensor of R*V. One file per op.

Attention and decoding run in a library compiled from csrc/cpu/. Where there is none, and in fp64, PyTorch runs them: ``plain``.
The ops of a decoder layer have nothing but the library.
"""

from __future__ import annotations

import torch

from . import _library

COMPILED = ("rms_norm", "rotary", "rotary_decode", "gated_activation")  # the reference does as well without a library
SERVES = ("thought_attention", "thought_decode", "sample_token", "linear_logprob", *COMPILED)


def why_not(op: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """Implements ``_dispatch.why_not``."""
    if op not in SERVES:
        return f"it has no kernel for {op}"
    if op in COMPILED and (reason := _without_library(op, dtype)):
        return reason
    return None if device.type in ("cpu", "meta") else f"it serves tensors on cpu, these are on {device}"


def _without_library(op: str, dtype: torch.dtype | None) -> str | None:
    if dtype not in (None, *_library.DTYPES):
        return f"it computes {op} in fp32, bf16 and fp16, got {dtype}"
    return _library.missing()


_without_library._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it instead of tracing it
