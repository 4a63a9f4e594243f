"""Tiles of rows of a [rows, width] matrix, whose width is padded to a power of two inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


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
