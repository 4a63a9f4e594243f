"""What the kernels of thought_attention's backward share: tiles, the mask, the weights and the gradient of the scores."""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton._math import tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(first, offsets, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[.., rows, BLOCK]: the rows ``offsets`` elements behind ``first``; 0 where not ``inside`` and from column WIDTH on."""
    column = tl.arange(0, BLOCK)
    mask = tl.expand_dims(inside, -1)
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)
    return tl.load(first + tl.expand_dims(offsets, -1) + column, mask=mask, other=0.0)


@triton.jit
def store_tile(first, offsets, inside, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``value`` to where ``load_tile`` would read it, in the pointer's dtype."""
    column = tl.arange(0, BLOCK)
    mask = tl.expand_dims(inside, -1)
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)
    tl.store(first + tl.expand_dims(offsets, -1) + column, value.to(first.dtype.element_ty), mask=mask)


@triton.jit
def in_range(n, first, count):
    """first <= n < first + count, in one comparison."""
    return (n - first).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def weights(qk, lse, scale, softcap):
    """p = exp(score - lse) of raw products q·k, and d score / d (scale * q·k). ``lse`` is in units of log 2."""
    if softcap is None:
        score, slope = qk * (scale * LOG2_E), 1.0
    else:
        capped = tanh(qk * (scale / softcap))
        score, slope = capped * (softcap * LOG2_E), 1 - capped * capped
    return tl.exp2(score - lse), slope


@triton.jit
def finite(keys):
    """Keys with 0 for NaN and infinity, where 0 times a key that a row doesn't see must be 0."""
    return tl.where(keys.to(tl.float32) * 0.0 == 0.0, keys, 0.0)
