"""rms_norm on CPUs, csrc/cpu/layer.hpp: this allocates what it writes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import _library


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``reference.rms_norm``."""
    if not _library.computes(dtype, x, delta, weight):
        return reference.rms_norm(x, delta, weight, eps, offset, dtype)
    out, rstd = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if delta is None else x.new_empty(x.shape)
    _library.ops().rms_norm(as_rows(x), as_rows(delta), weight.contiguous(), total, out, rstd, eps, offset)
    return x if total is None else total, out, rstd


def rms_norm_backward(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor, offset: float,
    delta: torch.dtype, needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Implements ``reference.rms_norm_backward``."""
    if not _library.computes(delta, grad_out, total, weight):
        return reference.rms_norm_backward(grad_out, grad_total, total, rstd, weight, offset, delta, needs_weight)
    dx = total.new_empty(total.shape)
    ddelta = None if delta == total.dtype else total.new_empty(total.shape, dtype=delta)
    dweight = weight.new_empty(weight.shape) if needs_weight else None
    _library.ops().rms_norm_backward(
        as_rows(grad_out), as_rows(grad_total), as_rows(total), rstd.contiguous(), weight.contiguous(), dx, ddelta, dweight,
        offset,
    )  # fmt: skip
    return dx, ddelta, dweight


def as_rows(x: Tensor | None) -> Tensor | None:
    """``x``, or one whose rows are evenly spaced and whose numbers in a row lie side by side."""
    if x is None or x.is_contiguous():
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
