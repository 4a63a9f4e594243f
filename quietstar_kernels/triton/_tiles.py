"""Tiles of a [rows, width] matrix, whose width is padded to a power of two inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quietstar_kernels.triton._launch import Plan, Tiles
from quietstar_kernels.triton._target import target
from quietstar_kernels.triton.configs import Config

BY_DESCRIPTOR = ("sm_90", "sm_100", "interpreter")  # targets that copy whole tiles to shared memory


def described(x: Tensor, *rows: int) -> list[TensorDescriptor] | list[None]:
    """Descriptors of x [B,heads,M,width] for tiles of each of ``rows``, or None for each if it must be read by pointer."""
    if x.itemsize == 4 or target() not in BY_DESCRIPTOR or x.data_ptr() % 16 or x.numel() == 0:
        return [None] * len(rows)
    shape = list(x.shape)
    strides = [stride if size > 1 else 16 for size, stride in zip(shape, x.stride(), strict=True)]
    steps = strides[:3]
    if 0 in steps or (steps[0] | steps[1] | steps[2]) * x.itemsize % 16:
        return [None] * len(rows)
    strides[3], width = 1, padded(shape[3])
    return [TensorDescriptor(x, shape, strides, [1, 1, size, width]) for size in rows]


def key_tiles(k: Tensor, v: Tensor, config: Config, known: Plan, *blocks: str) -> Tiles:
    """Descriptors of k and v for tiles of each of ``blocks``, k first; None for all if one must be read by pointer."""

    def describe() -> Tiles:
        rows = [config.blocks[block] for block in blocks]
        tiles = [tile for pair in zip(described(k, *rows), described(v, *rows), strict=True) for tile in pair]
        return [None] * len(tiles) if None in tiles else tiles

    return known.tiles(config, (k, v) * len(blocks), describe)


def padded(width: int) -> int:
    """Columns of a tile: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


@triton.jit
def load_rows(tiles, x, b, head, row, stride, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS,BLOCK]: the rows from ``row`` of batch row ``b`` and ``head``, by the descriptor ``tiles`` if there is one.

    Else by pointer: x points to the first row of that head, and rows from ``end`` are 0. A descriptor reads what memory holds
    there, and 0 after the last row.
    """
    if tiles is None:
        i = tl.arange(0, ROWS)
        return load_tile(x + row.to(tl.int64) * stride, i * stride, row + i < end, WIDTH, BLOCK)
    else:
        return tiles.load([b.to(tl.int32), head.to(tl.int32), row, 0]).reshape(ROWS, BLOCK)


@triton.jit
def load_tile(first, offsets, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[.., rows, BLOCK]: the rows ``offsets`` elements after ``first``; 0 if not ``inside``, and from column WIDTH."""
    return load_at(first + offsets, inside, WIDTH, BLOCK)


@triton.jit
def load_at(rows, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[.., rows, BLOCK]: the rows that start at the pointers ``rows``; 0 if not ``inside``, and from column WIDTH."""
    column = tl.arange(0, BLOCK)
    mask = tl.expand_dims(inside, -1)
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)
    return tl.load(tl.expand_dims(rows, -1) + column, mask=mask, other=0.0)


@triton.jit
def store_tile(first, offsets, inside, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores ``value`` where ``load_tile`` would read it, in the pointer's dtype."""
    column = tl.arange(0, BLOCK)
    mask = tl.expand_dims(inside, -1)
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)
    tl.store(first + tl.expand_dims(offsets, -1) + column, value.to(first.dtype.element_ty), mask=mask)


@triton.jit
def in_range(n, first, count):
    """first <= n < first + count, in one comparison."""
    return (n - first).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)
