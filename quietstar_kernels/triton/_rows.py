"""What each packed row sees, as computed in the kernels from a ``ThoughtLayout``, and the blocks that cover it.

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
def seen_by(begin, i, inside, anchor, lo, length, L, N, S, window):
    """Packed rows m = ``begin + i``, int32 [BLOCK], where ``inside``: (first, last, own_first, on).

    A row that is on sees text positions first..last, and the packed rows own_first..m of its own thought. Either range may
    be empty. anchor [P], lo [L] and length [P*N] point into one batch row; ``window`` is W, or 2^30 for none.
    """
    m = begin + i
    is_text = m < L
    start = tl.maximum(begin - L, 0)
    thought, s = divide(start, tl.maximum(m - L, 0) - start, S)
    place, _ = divide(start // S, thought - start // S, N)
    in_thought = inside & (m >= L)
    t = tl.load(anchor + place, mask=in_thought, other=-1)
    live = tl.load(length + thought, mask=in_thought, other=0)
    on = inside & (is_text | ((t >= 0) & (s < live)))
    stands_at = tl.where(is_text, m, t + 1 + s)
    t = tl.where(is_text, m, t)
    first = tl.maximum(tl.load(lo + t, mask=on, other=0), stands_at - window + 1)
    last = tl.where(on, t, -1)
    own_first = tl.where(is_text, m + 1, tl.maximum(m - s, m - window + 1))
    return first, last, own_first, on


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
def text_bounds(first, last, on):
    """Of rows that see the text first..last, [BLOCK] each: (start, all_from, all_to, end).

    No row that is on sees text outside start..end; all of them see all_from..all_to, which may be empty.
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
    """Blocks of text for bounds as those of ``text_bounds``: (before, full, edges).

    From ``start`` there are ``before`` blocks of BLOCK_EDGE that only some rows see, then ``full`` blocks of BLOCK_N that all
    rows that are on see, then ``edges - before`` blocks of BLOCK_EDGE.
    """
    before = tl.cdiv(tl.maximum(all_from - start, 0), BLOCK_EDGE)
    full_start = start + before * BLOCK_EDGE
    full = tl.maximum(all_to + 1 - full_start, 0) // BLOCK_N
    after = tl.cdiv(tl.maximum(end + 1 - full_start - full * BLOCK_N, 0), BLOCK_EDGE)
    return before, full, before + after


@triton.jit
def own_blocks(own_first, m, on, BLOCK: tl.constexpr):
    """First of the own rows that packed rows ``m`` [rows] see, own_first..m each, and how many blocks hold them all."""
    sees = on & (own_first <= m)
    start = tl.min(tl.where(sees, own_first, FAR), 0)
    return start, tl.cdiv(tl.maximum(tl.max(tl.where(sees, m, -1), 0) + 1 - start, 0), BLOCK)
