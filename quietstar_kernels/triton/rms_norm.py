"""rms_norm: a program takes whole rows, each read once. In the backward it walks over rows and sums the weight's gradient."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, as_rows, cdiv, plan
from .configs import Config, target

TILE = 1024  # numbers of short rows that a program takes together
# A program of the backward has registers for a row of 8192 numbers. Of a wider one it writes a part, and reads the others too.
WIDE, PART = 8192, 4096
WARPS = 8192  # of all programs of a backward, four for each of a multiprocessor's schedulers and more


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``reference.rms_norm``."""
    out, rstd = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x if delta is None else x.new_empty(x.shape)
    if out.numel() == 0:
        return total, out, rstd
    rows, more, weight = as_rows(x), None if delta is None else as_rows(delta), weight.contiguous()
    config = config_of(rows.shape[1])
    known = plan("rms_norm", (rows, more, weight), eps, offset, dtype)

    def prepare() -> Launch:
        (R, D), strides = rows.shape, (rows.stride(0), 0 if more is None else more.stride(0))
        return Launch(_norm, (cdiv(R, config.blocks["BLOCK_R"]),), (R, D, *strides, eps, offset), {})

    known.launch("norm", config, (rows, more, weight, None if more is None else total, out, rstd), prepare)
    return total, out, rstd


def rms_norm_backward(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor, offset: float,
    delta: torch.dtype, needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Implements ``reference.rms_norm_backward``."""
    d = total.new_empty(total.shape)
    ddelta = None if delta == total.dtype else total.new_empty(total.shape, dtype=delta)
    if d.numel() == 0:
        return d, ddelta, weight.new_zeros(weight.shape) if needs_weight else None
    grad, more, rows = as_rows(grad_out), None if grad_total is None else as_rows(grad_total), as_rows(total)
    weight = weight.contiguous()
    R, D = rows.shape
    config = config_of(D if D <= WIDE else PART)
    programs = min(cdiv(R, config.blocks["BLOCK_R"]), WARPS // config.num_warps)
    partial = rows.new_empty(programs, D, dtype=torch.float32) if needs_weight else None
    known = plan("rms_norm_backward", (grad, more, rows, weight), offset, delta, needs_weight)

    def prepare() -> Launch:
        strides = grad.stride(0), 0 if more is None else more.stride(0), rows.stride(0)
        parts = cdiv(D, config.blocks["BLOCK_D"])
        return Launch(_norm_backward, (programs, parts), (R, D, *strides, parts, offset), {})

    known.launch("backward", config, (grad, more, rows, rstd, weight, d, ddelta, partial), prepare)
    return d, ddelta, None if partial is None else partial.sum(0).to(weight.dtype)


@functools.cache
def config_of(D: int) -> Config:
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_R = max(1, TILE // BLOCK_D)
    warps = min(16, BLOCK_R * BLOCK_D // 256)
    most = 128 if BLOCK_D > 4096 and target().startswith("sm_") else None  # lest it spills to raise the occupancy
    return Config({"BLOCK_R": BLOCK_R, "BLOCK_D": BLOCK_D}, warps, maxnreg=most)


@triton.jit(do_not_specialize=["R"])
def _norm(
    x, delta, weight, total, out, rstd, R, D, stride_x, stride_delta, eps, offset, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r, c = row.to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
    on = (row < R)[:, None] & (c < D)
    value = tl.load(x + r * stride_x + c, mask=on, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + r * stride_delta + c, mask=on, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + r * D + c, rounded, mask=on)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(rstd + row, scale, mask=row < R)
    factor = offset + tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(out + r * D + c, (value * scale[:, None] * factor).to(out.dtype.element_ty), mask=on)


@triton.jit
def _read(total, grad_out, weight, scale, r, c, on, D, stride_total, stride_grad, offset):
    """The unit rows, their gradients, and the factors of the weight."""
    unit = tl.load(total + r * stride_total + c, mask=on, other=0.0).to(tl.float32) * scale
    grad = tl.load(grad_out + r * stride_grad + c, mask=on, other=0.0).to(tl.float32)
    return unit, grad, offset + tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R"])
def _norm_backward(
    grad_out, grad_total, total, rstd, weight, d, ddelta, partial, R, D, stride_grad, stride_more, stride_total, parts, offset,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        r, inside = row.to(tl.int64)[:, None], (row < R)[:, None]
        scale, on = tl.load(rstd + row, mask=row < R, other=0.0)[:, None], inside & (c < D)
        unit, grad, factor = _read(total, grad_out, weight, scale, r, c, on, D, stride_total, stride_grad, offset)
        products = grad * factor * unit
        for other in range(1, parts):
            c2 = (tl.program_id(1) + other) % parts * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            x, y, z = _read(total, grad_out, weight, scale, r, c2, inside & (c2 < D), D, stride_total, stride_grad, offset)
            products += x * y * z
        if partial is not None:
            sums += grad * unit
        grad = scale * (grad * factor - unit * (tl.sum(products, 1) / D)[:, None])
        if grad_total is not None:
            grad += tl.load(grad_total + r * stride_more + c, mask=on, other=0.0).to(tl.float32)
        tl.store(d + r * D + c, grad.to(d.dtype.element_ty), mask=on)
        if ddelta is not None:
            tl.store(ddelta + r * D + c, grad.to(ddelta.dtype.element_ty), mask=on)
    if partial is not None:
        c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(partial + tl.program_id(0) * D + c, tl.sum(sums, 0), mask=c < D)
