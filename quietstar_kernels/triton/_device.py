"""What the kernels have in common: tiles of memory, what each row sees, and the steps of the softmax.

The H/G query heads of a key head are folded into the rows: flat row f is row f // HG under query head f % HG of the group.

Records hold what belongs together. Of a launch's arguments, Triton specialises the numbers in one on their value, whatever
``do_not_specialize`` says; so sizes are separate arguments there. With Triton 3.6 no function can return a record with a None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # a row's top before its first key: finite, so that nothing is inf - inf
FAR = tl.constexpr(1 << 30)  # after every row


class Stride(NamedTuple):
    """Strides of a tensor [B,heads,rows,width], or c of [B,heads,C,rows,width]; the last is 1."""

    b: Any
    h: Any
    m: Any
    c: Any = None


class Tile(NamedTuple):
    """What a kernel is compiled for, each a ``tl.constexpr``: the widths of keys and values, also padded, the PRECISION of
    ``tl.dot``, and the blocks of a ``Config``, 0 in kernels that have none.
    """

    K: Any
    E: Any
    BLOCK_K: Any
    BLOCK_E: Any
    PRECISION: Any
    BLOCK_M: Any
    BLOCK_N: Any
    SLICES: Any
    BLOCK_EDGE: Any = tl.constexpr(0)
    CAREFUL: Any = tl.constexpr(0)


class Layout(NamedTuple):
    """Pointers to the tensors of ``Branches`` for one batch row: lo [L], table [C,3], of_row [R], and in a tree tree [C,4] and
    path [R,2], else None.
    """

    lo: Any
    table: Any
    of_row: Any
    tree: Any
    path: Any


class Sizes(NamedTuple):
    """L, M = L + R, and the options of the attention; ``window`` and ``softcap`` may be None."""

    L: Any
    M: Any
    window: Any
    scale: Any
    softcap: Any


class Seen(NamedTuple):
    """What the packed rows of a tile see, [rows] each.

    A row that is ``on`` sees text first..last, of which a window leaves position ids from ``oldest`` on, and packed rows
    own_first..own_last of its own branch. A text row's own range is empty, from m + 1 to m. In a tree, own_first is a row of
    the path instead, and a row sees none after own_last: see ``keys_of_node``.
    """

    first: Any
    last: Any
    own_first: Any
    own_last: Any
    oldest: Any
    on: Any


class Keys(NamedTuple):
    """Where a kernel of the queries reads keys and values: pointers to the first row of a head, and strides from row to row."""

    k: Any
    v: Any
    stride_k: Any
    stride_v: Any


class Limits(NamedTuple):
    """Keys of a tile. No row that is on sees keys outside start..final; all see all_from..all_to, which may be empty."""

    start: Any
    all_from: Any
    all_to: Any
    final: Any


class Blocks(NamedTuple):
    """The blocks that cover a ``Limits``.

    From ``start`` there are ``before`` blocks of BLOCK_EDGE that only some rows see, then ``full`` blocks of BLOCK_N that all
    rows that are on see, then ``edges - before`` blocks of BLOCK_EDGE. Without full blocks these are one run, so that few keys
    take as few blocks as hold them.
    """

    start: Any
    before: Any
    full: Any
    edges: Any


@triton.jit
def taking_turns(pairs, together):
    """(pair, turn) of this program: see ``turn_of``."""
    return turn_of(tl.program_id(0), tl.num_programs(0), pairs, together)


@triton.jit
def turn_of(program, programs, pairs, together):
    """(pair, turn) of a program. Programs begin in this order: the first of ``together`` pairs each, their second, ..

    Only then do the next pairs begin. So the text that running programs read fits in the L2 cache.
    """
    each = programs // pairs
    first = program // (each * together) * together
    among = tl.minimum(together, pairs - first)
    turn = program - first * each
    return first + turn % among, turn // among


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
    column = tl.arange(0, BLOCK)
    mask = tl.expand_dims(inside, -1)
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)
    return tl.load(tl.expand_dims(first + offsets, -1) + column, mask=mask, other=0.0)


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
def seen_by(m, inside, layout, L, full, window):
    """``Seen`` of packed rows m, int32 [rows], where ``inside``."""
    lo, table, of_row, tree, _ = layout
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
    causal = is_text | (full == 0)
    if tree is not None:
        own_first -= tl.load(tree + branch * 4, mask=in_branch, other=0)
        causal |= tl.load(tree + branch * 4 + 2, mask=in_branch, other=0) == 0
    own_last = tl.where(causal, m, start + length - 1)
    oldest = own_first
    row = m - own_first  # of the branch or path; -1 for a text row
    if window is not None:
        oldest = last - first + row + 2 - window
        own_first = tl.maximum(own_first, m - window + 1)
    if tree is not None:
        own_first = tl.maximum(row + 1 - window, 0) if window is not None else row * 0
    return Seen(first, last, own_first, own_last, oldest, on)


@triton.jit
def first_node(m, on, of_row, L):
    """The node of the first row that is on; -1 for rows of the text. of_row [R] is that of the batch row."""
    first = tl.min(tl.where(on & (m >= L), m, FAR), 0)
    return tl.load(of_row + (first - L), mask=first < FAR, other=-1)


@triton.jit
def keys_of_node(node, near, seen, layout, L):
    """Packed rows first..last, [rows] each, that a tile's rows see of a node on the path of the first of them, and its parent.

    All that a row of the tile sees is on that path or, being of a later node, in the tile: so if ``near``, for the node of the
    tile's first row, the last is the row's own. Keys between may be of nodes that are not on its path: see ``on_path``.
    """
    there = node >= 0
    _, table, _, tree, _ = layout
    begin = tl.load(table + node * 3 + 1, mask=there, other=0)
    stop = begin + tl.load(table + node * 3 + 2, mask=there, other=0)
    depth = tl.load(tree + node * 4, mask=there, other=FAR)
    end = tl.load(tree + node * 4 + 1, mask=there, other=0)
    begin, end = tl.where(there, begin + L, FAR), tl.where(there, end + L, FAR)
    last = tl.minimum(seen.own_last, tl.where(near, FAR, stop + L) - 1)
    first = tl.where(seen.own_last < end, begin + tl.maximum(seen.own_first - depth, 0), end)
    return tl.minimum(first, last + 1), last, tl.load(tree + node * 4 + 3, mask=there, other=-1)


@triton.jit
def on_path(n, seen, path, sizes):
    """[rows,keys]: whether keys n [keys] are on the paths of the rows, whose ends ``seen`` holds. True for keys of the text.

    path [R,2] is that of the batch row.
    """
    own = (n >= sizes.L) & (n < sizes.M)
    path += (n - sizes.L) * 2
    on = (tl.load(path, mask=own, other=FAR) + sizes.L)[None, :] > seen.own_last[:, None]
    if sizes.window is not None:
        on &= tl.load(path + 1, mask=own, other=FAR)[None, :] >= seen.own_first[:, None]
    return on


@triton.jit
def tile_start(tile, tiles, L, R, HG, BLOCK_M: tl.constexpr):
    """(first flat row, begin, end) of one of ``tiles`` row tiles: its rows are text, begin 0 to end L, or thoughts, L to L + R.

    Flat rows count from ``begin``. The tiles that see the most come first: thoughts backwards, then text backwards.
    """
    thought_tiles = (R * HG + BLOCK_M - 1) // BLOCK_M
    is_text = tile >= thought_tiles
    index = tl.where(is_text, tiles, thought_tiles) - 1 - tile
    return index * BLOCK_M, tl.where(is_text, 0, L), tl.where(is_text, L, L + R)


@triton.jit
def tile_rows(flat, begin, end, HG, BLOCK_M: tl.constexpr):
    """Rows of the tile that ``tile_start`` gave: packed row, head in its group, whether there is such a row; [BLOCK_M] each."""
    row, head = divide(flat, tl.arange(0, BLOCK_M), HG)
    return begin + row, head, begin + row < end


@triton.jit
def tile_rows_again(zero, flat, begin, end, HG, BLOCK_M: tl.constexpr):
    """As ``tile_rows``, with a ``zero`` that the compiler can't know to be 0.

    Else it keeps rows and heads in registers from the beginning of a kernel to its end, which loops need.
    """
    i = tl.arange(BLOCK_M, 2 * BLOCK_M) & (BLOCK_M - 1 + zero)
    row, head = divide(flat + zero, i, HG)
    return begin + row, head, begin + row < end


@triton.jit
def row_tile(tile, text_tiles, text_start, text_end, own_start, own_end, BLOCK_M: tl.constexpr):
    """(first query row, row after the last) of a tile of a head. Text tiles come first."""
    in_text = tile < text_tiles
    start = tl.where(in_text, text_start + tile * BLOCK_M, own_start + (tile - text_tiles) * BLOCK_M)
    return start, tl.where(in_text, text_end, own_end)


@triton.jit
def bounds(first, last, on):
    """The ``Limits`` of rows that see the keys first..last, [rows] each."""
    sees = on & (first <= last)
    start = tl.min(tl.where(sees, first, FAR), 0)
    all_from = tl.max(tl.where(sees, first, 0), 0)
    all_to = tl.min(tl.where(sees, last, tl.where(on, -1, FAR)), 0)
    final = tl.max(tl.where(sees, last, -1), 0)
    return Limits(start, all_from, all_to, final)


@triton.jit
def window_bounds(limits, oldest, on, lo, i):
    """The same ``Limits`` for rows that see no position id below ``oldest``, [rows]; lo [L] is that of the batch row.

    Position ids n - lo[n] need not ascend, so all of the text is checked, in steps of i = 0, 1, ..
    """
    start, all_from, all_to, final = limits
    lowest = tl.min(tl.where(on, oldest, FAR), 0)
    highest = tl.max(tl.where(on, oldest, -FAR), 0)
    begin = tl.maximum(start, lowest)  # no position has an id above itself
    start = begin * 0 + FAR
    all_from = tl.maximum(all_from, begin)
    for n0 in range(begin, final + 1, i.shape[0]):
        n = n0 + i
        position = n - tl.load(lo + n, mask=n <= final, other=0)
        start = tl.minimum(start, tl.min(tl.where((n <= final) & (position >= lowest), n, FAR), 0))
        all_from = tl.maximum(all_from, tl.max(tl.where((n <= final) & (position < highest), n + 1, 0), 0))
    return Limits(start, all_from, all_to, final)


@triton.jit
def cover(limits, tile):
    """The ``Blocks`` of a ``Limits``."""
    start, all_from, all_to, final = limits
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_EDGE: tl.constexpr = tile.BLOCK_EDGE
    before = (tl.maximum(all_from - start, 0) + BLOCK_EDGE - 1) // BLOCK_EDGE
    full_start = start + before * BLOCK_EDGE
    full = tl.maximum(all_to + 1 - full_start, 0) // BLOCK_N
    after = (tl.maximum(final + 1 - full_start - full * BLOCK_N, 0) + BLOCK_EDGE - 1) // BLOCK_EDGE
    return Blocks(start, before, full, before + after)


@triton.jit
def edge_block(j, blocks, tile):
    """First key of block ``j`` of those that ``cover`` counts as edges."""
    return blocks.start + j * tile.BLOCK_EDGE + tl.where(j < blocks.before, 0, blocks.full * tile.BLOCK_N)


@triton.jit
def scores(queries, keys, scale, softcap, SLICES: tl.constexpr, PRECISION: tl.constexpr):
    """queries [rows,K] times keys [columns,K]: [rows,columns]. With a soft cap scaled and capped, else not yet scaled.

    SLICES splits K, into at least 16 each. Warps then share the columns of the factors, which in fp32 take too many registers.
    """
    WIDTH: tl.constexpr = max(16, queries.shape[-1] // SLICES)
    COUNT: tl.constexpr = queries.shape[-1] // WIDTH
    if COUNT > 1:
        keys = tl.permute(slices(keys, COUNT), [0, 2, 1])
        s = tl.sum(tl.dot(slices(queries, COUNT), keys, input_precision=PRECISION), 0)
    else:
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    return s if softcap is None else softcap * bend(s * (scale / softcap), queries.dtype)


@triton.jit
def slices(x, COUNT: tl.constexpr):
    """[rows,K] to [COUNT,rows,K/COUNT]."""
    return tl.permute(tl.reshape(x, [x.shape[0], COUNT, x.shape[1] // COUNT]), [1, 0, 2])


@triton.jit
def softmax_step(s, values, factor, top, total, acc, PRECISION: tl.constexpr):
    """``top``, ``total`` and ``acc`` after more keys, of scores s [rows,keys], times ``factor`` in units of log 2, and values.

    The sum of a row's weights so far is ``total`` times 2^top, and its weighted sum of values is ``acc`` times 2^top.
    """
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total, acc = total * decay + tl.sum(p, 1), acc * decay[:, None]
    return new_top, total, tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)


@triton.jit
def without_poison(values):
    """Values [keys,E], 0 for keys that have NaN or infinity, and [keys], NaN for such a key, else 0.

    Adding the latter to the scores makes the rows that see the key NaN. 0 * NaN must not reach the others.
    """
    if values.dtype == tl.float32:
        bits, EXPONENT = values.to(tl.int32, bitcast=True), 0x7F800000
    else:
        bits, EXPONENT = values.to(tl.int16, bitcast=True), 0x7F80 if values.dtype == tl.bfloat16 else 0x7C00
    poisoned = tl.max(bits & EXPONENT, axis=1) == EXPONENT
    return tl.where(poisoned[:, None], 0.0, values), tl.where(poisoned, float("nan"), 0.0)


@triton.jit
def weights(qk, lse, scale, softcap, dtype: tl.constexpr):
    """exp(score - lse) of products q·k, and d score / d (scale * q·k).

    ``lse`` is in units of log 2 and has the same rank as qk; ``dtype`` is that of q and k.
    """
    if softcap is None:
        x, factor, slope = qk, scale * LOG2_E, 1.0
    else:
        x = bend(qk * (scale / softcap), dtype)
        factor, slope = softcap * LOG2_E, 1 - x * x
    return tl.exp2(tl.fma(x, factor, -lse)), slope  # the product isn't rounded, which for a score of 20 would change it by 1e-6


@triton.jit
def tanh(x):
    """tanh of fp32 ``x`` to 6 ulps, by the rational function of Eigen and XLA, degree 13 over degree 6. NaN stays NaN."""
    x = tl.where(x > 7.905311, 7.905311, tl.where(x < -7.905311, -7.905311, x))
    y = x * x
    above = 2.00018790482477e-13 + y * -2.76076847742355e-16
    above = -8.60467152213735e-11 + y * above
    above = 5.12229709037114e-08 + y * above
    above = 1.48572235717979e-05 + y * above
    above = 6.37261928875436e-04 + y * above
    above = 4.89352455891786e-03 + y * above
    below = 1.18534705686654e-04 + y * 1.19825839466702e-06
    below = 2.26843463243900e-03 + y * below
    below = 4.89352518554385e-03 + y * below
    return x * above / below


@triton.jit
def bend(x, dtype: tl.constexpr):
    """tanh of fp32 ``x`` for a soft cap: accurate for fp32 tensors, with an absolute error of 2^-22 for 16-bit ones."""
    if dtype == tl.float32:
        return tanh(x)
    else:  # a third of the instructions; the error is far below the rounding of 16-bit scores
        return 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
