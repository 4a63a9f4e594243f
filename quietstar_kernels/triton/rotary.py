"""rotary and rotary_decode: a program takes a row, all heads of which have the same cos and sin, many heads at a time.

A head is two tiles, its halves. In the backward with norms a program walks over rows and sums the gradients of the weights.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, as_rows, plan
from .configs import Config

TILE = 2048  # numbers of halves that a program takes at a time
PROGRAMS = 1024  # of a backward with norms


class Heads(NamedTuple):
    """What a kernel is compiled for, each a ``tl.constexpr``; HALF is K / 2, and the blocks are powers of two."""

    H: Any
    G: Any
    HALF: Any
    BLOCK_H: Any
    BLOCK_G: Any
    BLOCK_HALF: Any


def rotary(
    qkv: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, offset: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Implements ``reference.rotary``."""
    q, k_out = _empty(qkv, H, cos), _empty(qkv, G, cos)
    v_out = _empty(qkv, G, cos) if k is None else None
    _turn_all(qkv, k, None, cos, sin, q_weight, k_weight, q, k_out, v_out, None, eps, offset)
    return q, k_out, v_out


def rotary_decode(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, k_own: Tensor, v_own: Tensor,
    step: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float,
) -> Tensor:  # fmt: skip
    """Implements ``reference.rotary_decode``."""
    q = _empty(qkv, H, cos)
    _turn_all(qkv, k, v, cos, sin, q_weight, k_weight, q, k_own, v_own, step, eps, offset)
    if not k_own.is_inference():
        torch.autograd.graph.increment_version((k_own, v_own))
    return q


def _empty(qkv: Tensor, heads: int, cos: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], heads, cos.shape[-1]).transpose(1, 2)


def _turn_all(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, q: Tensor, k_out: Tensor, v_out: Tensor | None, step: Tensor | None, eps: float, offset: float,
) -> None:  # fmt: skip
    """Write q, and k and v where ``k_out`` and ``v_out`` [B,G,n,K] are, or at a step of [B,G,n,S,K]."""
    if q.numel() == 0:
        return
    inputs = _tables(cos, sin, q_weight, k_weight, qkv, k, v)
    known = plan("rotary", (*inputs, k_out, v_out, step), q.shape[1], eps, offset)
    config, tile = _config(q.shape[1], k_out.shape[1], q.shape[3])

    def prepare() -> Launch:
        B, _, n, _ = q.shape
        strides = [0 if x is None else x.stride(0) for x in (inputs[0], *inputs[4:])]
        to = [s for x in (k_out, v_out) for s in ((0,) * 4 if x is None else x.stride()[:4])]
        return Launch(_turn, (B * n,), (n, len(inputs[0]), *strides, *to, eps, offset), {"tile": tile})

    known.launch("turn", config, (*inputs, q, k_out, v_out, step), prepare)


def rotary_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, cos: Tensor, sin: Tensor, qkv: Tensor | None, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, needs_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Implements ``reference.rotary_backward``."""
    (B, H, n, K), G, rows = grad_q.shape, grad_k.shape[1], grad_q.shape[0] * grad_q.shape[2]
    d = grad_q.new_empty(B, n, (H if grad_v is None else H + 2 * G) * K)
    dk = grad_q.new_empty(B, n, G * K) if grad_v is None else None
    with_norms = q_weight is not None or k_weight is not None
    programs = min(rows, PROGRAMS) if with_norms else rows
    partial = grad_q.new_empty(programs, 2, K, dtype=torch.float32) if with_norms and needs_weights else None
    if rows:
        inputs = _tables(cos, sin, q_weight, k_weight, qkv, k)
        grads = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (grad_q, grad_k, grad_v)]
        known = plan("rotary_backward", (*inputs, *grads), eps, offset, needs_weights)
        config, tile = _config(H, G, K)

        def prepare() -> Launch:
            strides = [0 if x is None else x.stride(0) for x in (inputs[0], *inputs[4:])]
            of_grads = [s for x in grads for s in ((0,) * 3 if x is None else x.stride()[:3])]
            numbers = rows, n, len(inputs[0]), *strides, *of_grads, eps, offset
            return Launch(_turn_back, (programs,), numbers, {"tile": tile})

        known.launch("back", config, (*inputs, *grads, d, dk, partial), prepare)
    if partial is None:
        return d, dk, None, None
    sums = partial.sum(0)
    dweights = [None if w is None else x.to(w.dtype) for x, w in zip(sums, (q_weight, k_weight), strict=True)]
    return d, dk, dweights[0], dweights[1]


def _tables(cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *inputs: Tensor | None) -> tuple:
    """All of them as the kernels take them: rows, the same stride for cos and sin."""
    cos, sin = as_rows(cos), as_rows(sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    weights = (None if x is None else x.contiguous() for x in (q_weight, k_weight))
    return cos, sin, *weights, *(None if x is None else as_rows(x) for x in inputs)


@functools.cache
def _config(H: int, G: int, K: int) -> tuple[Config, Heads]:
    width = triton.next_power_of_2(K // 2)
    blocks = [min(triton.next_power_of_2(heads), max(1, TILE // width)) for heads in (H, G)]
    warps = max(1, min(8, max(blocks) * width // 256))
    return Config({}, num_warps=warps), Heads(*map(tl.constexpr, (H, G, K // 2, *blocks, width)))


@triton.jit
def _halves(x, at, on, HALF):
    return tl.load(x + at, mask=on, other=0.0).to(tl.float32), tl.load(x + at + HALF, mask=on, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(out, at, x1, x2, on, HALF):
    tl.store(out + at, x1.to(out.dtype.element_ty), mask=on)
    tl.store(out + at + HALF, x2.to(out.dtype.element_ty), mask=on)


@triton.jit
def _rstd(x1, x2, eps, HALF):
    return tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]


@triton.jit
def _turn_heads(x, out, stride, weight, cos1, cos2, sin1, sin2, eps, offset, HEADS, BLOCK, tile):
    """Norm and turn the heads x [HEADS,K] of a row to ``out``, whose heads are ``stride`` apart."""
    column = tl.arange(0, tile.BLOCK_HALF)
    within = column < tile.HALF
    for first in range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        on = (head < HEADS) & within[None, :]
        x1, x2 = _halves(x, head * 2 * tile.HALF + column[None, :], on, tile.HALF)
        if weight is not None:
            w1, w2 = _halves(weight, column, within, tile.HALF)
            rstd = _rstd(x1, x2, eps, tile.HALF)
            x1, x2 = x1 * rstd * (offset + w1), x2 * rstd * (offset + w2)
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
        _store_halves(out, head.to(tl.int64) * stride + column[None, :], y1, y2, on, tile.HALF)


@triton.jit
def _copy_heads(x, stride_x, out, stride, tile):
    """The G heads of a row."""
    column = tl.arange(0, tile.BLOCK_HALF)[None, :]
    for first in range(0, tile.G, tile.BLOCK_G):
        head = first + tl.arange(0, tile.BLOCK_G).to(tl.int64)[:, None]
        on = (head < tile.G) & (column < tile.HALF)
        x1, x2 = _halves(x, head * stride_x + column, on, tile.HALF)
        _store_halves(out, head * stride + column, x1, x2, on, tile.HALF)


@triton.jit(do_not_specialize=["n", "tables"], do_not_specialize_on_alignment=["step"])
def _turn(
    cos, sin, q_weight, k_weight, qkv, k, v, q_out, k_out, v_out, step, n, tables, stride_table, stride_q, stride_k, stride_v,
    k_b, k_g, k_n, k_s, v_b, v_g, v_n, v_s, eps, offset, tile,
):  # fmt: skip
    K: tl.constexpr = 2 * tile.HALF
    row = tl.program_id(0).to(tl.int64)
    b, i = row // n, row % n
    column = tl.arange(0, tile.BLOCK_HALF)
    table = row % tables * stride_table
    cos1, cos2 = _halves(cos + table, column, column < tile.HALF, tile.HALF)
    sin1, sin2 = _halves(sin + table, column, column < tile.HALF, tile.HALF)
    qkv += row * stride_q
    _turn_heads(qkv, q_out + row * tile.H * K, K, q_weight, cos1, cos2, sin1, sin2, eps, offset, tile.H, tile.BLOCK_H, tile)
    k_out += b * k_b + i * k_n
    if step is not None:
        k_out += tl.load(step).to(tl.int64) * k_s
    k = qkv + tile.H * K if k is None else k + row * stride_k
    _turn_heads(k, k_out, k_g, k_weight, cos1, cos2, sin1, sin2, eps, offset, tile.G, tile.BLOCK_G, tile)
    if v_out is not None:
        v_out += b * v_b + i * v_n
        if step is not None:
            v_out += tl.load(step).to(tl.int64) * v_s
        v = k + tile.G * K if v is None else v + row * stride_v
        _copy_heads(v, K, v_out, v_g, tile)


@triton.jit
def _turn_heads_back(grad, stride, x, d, weight, cos1, cos2, sin1, sin2, sum1, sum2, eps, offset, HEADS, BLOCK, tile):
    """Write the gradient of a row's heads to d [HEADS,K], and add that of the weight to the sums [BLOCK,BLOCK_HALF]."""
    column = tl.arange(0, tile.BLOCK_HALF)
    within = column < tile.HALF
    for first in range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        on = (head < HEADS) & within[None, :]
        at = head * 2 * tile.HALF + column[None, :]
        g1, g2 = _halves(grad, head.to(tl.int64) * stride + column[None, :], on, tile.HALF)
        y1, y2 = g1 * cos1 + g2 * sin2, g2 * cos2 - g1 * sin1
        if weight is not None:
            w1, w2 = _halves(weight, column, within, tile.HALF)
            x1, x2 = _halves(x, at, on, tile.HALF)
            rstd = tl.where(head < HEADS, _rstd(x1, x2, eps, tile.HALF), 0.0)
            x1, x2 = x1 * rstd, x2 * rstd
            sum1 += y1 * x1
            sum2 += y2 * x2
            y1, y2 = y1 * (offset + w1), y2 * (offset + w2)
            mean = ((tl.sum(y1 * x1, 1) + tl.sum(y2 * x2, 1)) / (2 * tile.HALF))[:, None]
            y1, y2 = rstd * (y1 - x1 * mean), rstd * (y2 - x2 * mean)
        _store_halves(d, at, y1, y2, on, tile.HALF)
    return sum1, sum2


@triton.jit(do_not_specialize=["rows", "n", "tables"])
def _turn_back(
    cos, sin, q_weight, k_weight, qkv, k, grad_q, grad_k, grad_v, d, dk, partial, rows, n, tables, stride_table, stride_q,
    stride_k, q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, eps, offset, tile,
):  # fmt: skip
    K: tl.constexpr = 2 * tile.HALF
    column = tl.arange(0, tile.BLOCK_HALF)
    within = column < tile.HALF
    q1 = tl.zeros([tile.BLOCK_H, tile.BLOCK_HALF], tl.float32)
    q2, k1 = q1, tl.zeros([tile.BLOCK_G, tile.BLOCK_HALF], tl.float32)
    k2 = k1
    for turn in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(turn, tl.int64)
        b, i = row // n, row % n
        table = row % tables * stride_table
        cos1, cos2 = _halves(cos + table, column, within, tile.HALF)
        sin1, sin2 = _halves(sin + table, column, within, tile.HALF)
        to = d + row * (tile.H + 2 * tile.G if dk is None else tile.H) * K
        of_q, of_k = qkv, k
        if qkv is not None:
            of_q = qkv + row * stride_q
            of_k = of_q + tile.H * K if k is None else k + row * stride_k
        q1, q2 = _turn_heads_back(
            grad_q + b * q_b + i * q_n, q_h, of_q, to, q_weight, cos1, cos2, sin1, sin2, q1, q2, eps, offset,
            tile.H, tile.BLOCK_H, tile,
        )  # fmt: skip
        to = to + tile.H * K if dk is None else dk + row * tile.G * K
        k1, k2 = _turn_heads_back(
            grad_k + b * k_b + i * k_n, k_g, of_k, to, k_weight, cos1, cos2, sin1, sin2, k1, k2, eps, offset,
            tile.G, tile.BLOCK_G, tile,
        )  # fmt: skip
        if grad_v is not None:
            _copy_heads(grad_v + b * v_b + i * v_n, v_g, to + tile.G * K, K, tile)
    if partial is not None:
        partial += tl.program_id(0) * 2 * K
        _store_halves(partial, column, tl.sum(q1, 0), tl.sum(q2, 0), within, tile.HALF)
        _store_halves(partial + K, column, tl.sum(k1, 0), tl.sum(k2, 0), within, tile.HALF)
