"""What each packed row sees, as computed in the kernels from ``Branches``, and the blocks that cover it.

The H/G query heads of a key head are folded into the rows: flat row f is row f // HG under query head f % HG of the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 30)  # after every row


@triton.jit
def divide(first, i, by):
    """Quotient and remainder of ``first + i`` by ``by``: first >= 0 and by > 0 are scalars, 0 <= i < 2^22.

    The rows of a tile are close to its first. So they share one integer division, which takes dozens of instructions; the rest
    is a floating-point division, which may be off by one.
    """
    i += first % by
    quotient = (i.to(tl.float32) * (1.0 / by)).to(tl.int32)
    quotient -= (quotient * by > i).to(tl.int32)
    quotient += (i - quotient * by >= by).to(tl.int32)
    return first // by + quotient, i - quotient * by


@triton.jit
def seen_by(m, inside, lo, table, of_row, L, full):
    """Packed rows m, int32 [BLOCK], where ``inside``: (first, last, own_first, own_last, on).

    A row that is on sees text first..last and packed rows own_first..own_last of its own branch, if there is no window. A text
    row's own range is empty, from m + 1 to m. lo [L], table [C,3] and of_row [R] are those of one batch row.
    """
    is_text = m < L
    branch = tl.load(of_row + (m - L), mask=inside & (m >= L), other=-1).to(tl.int64)
    in_branch = branch >= 0
    table += branch * 3
    anchor = tl.load(table, mask=in_branch, other=-1)
    start = tl.load(table + 1, mask=in_branch, other=0) + L
    length = tl.load(table + 2, mask=in_branch, other=0)
    on = inside & (is_text | in_branch)
    last = tl.where(is_text, m, anchor)
    first = tl.load(lo + last, mask=on, other=0)
    own_first = tl.where(is_text, m + 1, start)
    own_last = tl.where(is_text | (full == 0), m, start + length - 1)
    return first, last, own_first, own_last, on


@triton.jit
def tile_start(tile, tiles, L, R, HG, BLOCK_M: tl.constexpr):
    """(first flat row, begin, end) of one of ``tiles`` row tiles: its rows are text, begin 0 to end L, or thoughts, L to L + R.

    Flat rows count from ``begin``. The tiles that see the most come first: thoughts backwards, then text backwards.
    """
    thought_tiles = tl.cdiv(R * HG, BLOCK_M)
    is_text = tile >= thought_tiles
    index = tl.where(is_text, tiles, thought_tiles) - 1 - tile
    return index * BLOCK_M, tl.where(is_text, 0, L), tl.where(is_text, L, L + R)


@triton.jit
def tile_rows(flat, begin, end, HG, BLOCK_M: tl.constexpr):
    """Rows of the tile that ``tile_start`` gave: packed row, head in its group, whether there is such a row; [BLOCK_M] each."""
    row, head = divide(flat, tl.arange(0, BLOCK_M), HG)
    return begin + row, head, begin + row < end


@triton.jit
def bounds(first, last, on):
    """Of rows that see the keys first..last, [BLOCK] each: (start, all_from, all_to, end).

    No row that is on sees keys outside start..end; all of them see all_from..all_to, which may be empty.
    """
    sees = on & (first <= last)
    start = tl.min(tl.where(sees, first, FAR), 0)
    all_from = tl.max(tl.where(sees, first, 0), 0)
    all_to = tl.min(tl.where(sees, last, tl.where(on, -1, FAR)), 0)
    end = tl.max(tl.where(sees, last, -1), 0)
    return start, all_from, all_to, end


@triton.jit
def window_bounds(start, all_from, end, oldest, on, lo, BLOCK: tl.constexpr):
    """``start`` and ``all_from`` for rows that see no position id below ``oldest``, [rows]; lo [L] is that of the batch row.

    Position ids n - lo[n] need not ascend, so all of the text is checked.
    """
    lowest = tl.min(tl.where(on, oldest, FAR), 0)
    highest = tl.max(tl.where(on, oldest, -FAR), 0)
    begin = tl.maximum(start, lowest)  # no position has an id above itself
    start = begin * 0 + FAR
    all_from = tl.maximum(all_from, begin)
    for n0 in tl.range(begin, end + 1, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        position = n - tl.load(lo + n, mask=n <= end, other=0)
        start = tl.minimum(start, tl.min(tl.where((n <= end) & (position >= lowest), n, FAR), 0))
        all_from = tl.maximum(all_from, tl.max(tl.where((n <= end) & (position < highest), n + 1, 0), 0))
    return start, all_from


@triton.jit
def cover(start, all_from, all_to, end, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr):
    """Blocks of keys for ``bounds``: (before, full, edges).

    From ``start`` there are ``before`` blocks of BLOCK_EDGE that only some rows see, then ``full`` blocks of BLOCK_N that all
    rows that are on see, then ``edges - before`` blocks of BLOCK_EDGE. Without full blocks these are one run, so that few keys
    take as few blocks as hold them.
    """
    before = tl.cdiv(tl.maximum(all_from - start, 0), BLOCK_EDGE)
    full_start = start + before * BLOCK_EDGE
    full = tl.maximum(all_to + 1 - full_start, 0) // BLOCK_N
    after = tl.cdiv(tl.maximum(end + 1 - full_start - full * BLOCK_N, 0), BLOCK_EDGE)
    return before, full, before + after


@triton.jit
def edge_block(j, start, before, full, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr):
    """First key of block ``j`` of those that ``cover`` counts as edges."""
    return start + j * BLOCK_EDGE + tl.where(j < before, 0, full * BLOCK_N)
