"""Forward of thought_attention in Gluon, for Hopper: warp groups that hand over what they have copied and computed.

A program stays on its multiprocessor and takes tile after tile. A tile is two groups of 64 flat rows of one key head: flat row
i of a group is head i // (64 / HEADS), row i % (64 / HEADS), where HEADS is the largest power of two that divides H/G. Keys and
their order are those of ``forward``. There are four partitions:

- ``list_work``, a warp, reads what the rows of the next tile see, and hands it out as items: one, or in a tree one for each
  node on the path of the tile's first row;
- ``copy_keys``, a warp, copies the queries of the next tile, and the keys and values of each item into a ring;
- two ``attend``, each a warp group, multiply the 64 rows of one group with them.

Who has written a slot arrives at its barrier "full", and who has read it at "empty".

Because of 0 * NaN, a value that isn't finite also changes rows that don't see it. If a program has had such a row, it takes all
its tiles again, and checks the values at edges. Of whole blocks, all rows see all keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..._options import AttentionOptions
from ...branches import Branches
from .._device import FAR, LN_2, LOG2_E, LOWEST, Blocks, Layout, Seen, Sizes
from .._gluon import (
    DTYPES,
    GROUP,
    LINES,
    Place,
    after,
    barriers,
    bend,
    bounds,
    copy_tile,
    cover,
    described,
    edge_block,
    first_node,
    in_range,
    keys_of_node,
    number,
    on_path,
    processors,
    put,
    seen_by,
    tile_start,
    turn_of,
    window_bounds,
    without_poison,
)
from .._launch import Launch, Plan, cdiv, pairs_together
from ..configs import ATTENTION_FORWARD_GLUON, pick

REGISTERS, OTHERS = gl.constexpr(208), gl.constexpr(88)  # of a thread of ``attend``, and of the other two
BUFFERS = gl.constexpr(2)  # of queries and of items
TABLES = gl.constexpr(7)  # of an item:
FIRST, COUNT, OWN_FIRST, OWN_COUNT, OLDEST, PATH_LAST, PATH_FIRST = (gl.constexpr(i) for i in range(7))
# Of an item: the Blocks of own keys and of text, whether more items of the tile follow, and the own keys that each group sees.
NUMBERS = gl.constexpr(13)
VERDICT = gl.constexpr(26)  # after the numbers of all items: of each group, whether a row was not finite
FACTS = gl.constexpr(28)
# What partitions read from shared memory where they need it, as it would take registers from their loops.
(
    AT_SINKS, AT_LO, AT_TABLE, AT_OF_ROW, AT_TREE, AT_PATH, AT_LSE, AT_TILES, AT_PAIRS, AT_TOGETHER, AT_G, AT_HG,
    AT_ROWS, AT_L, AT_R, AT_C, AT_FULL_OWN, AT_WINDOW,
) = (gl.constexpr(28 + i) for i in range(18))  # fmt: skip


class Shared(NamedTuple):
    """Shared memory, with the barriers of each ring."""

    q: Any  # [2 * BUFFERS, 1, HEADS, GROUP / HEADS, K], of both groups in turn
    q_full: Any  # barriers, as many as tiles
    q_empty: Any
    k: Any  # [STAGES, BLOCK_N, K], as v
    k_full: Any
    v: Any
    v_full: Any
    empty: Any  # of both
    tables: Any  # int32 [BUFFERS * TABLES, 2 * GROUP]
    numbers: Any  # int64 [FACTS + .., 1]
    item_full: Any
    item_empty: Any
    finite: Any  # [2, BLOCK_EDGE, K], of each group
    verdict: Any  # a barrier


class Tile(NamedTuple):
    """What a kernel is compiled for, each a ``gl.constexpr``. STAGES are of the ring; SINKS is their dtype, or None."""

    K: Any
    HEADS: Any
    BLOCK_N: Any
    BLOCK_EDGE: Any
    STAGES: Any
    WINDOW: Any
    SOFTCAP: Any
    SINKS: Any
    TREE: Any


def launch(
    q: Tensor, k: Tensor, v: Tensor, branches: Branches, layout: list[Tensor | None], options: AttentionOptions, out: Tensor,
    lse: Tensor, known: Plan,
) -> None:  # fmt: skip
    """Write out [B,H,rows,K] and lse [B,H,rows], contiguous, where ``gluon_serves``; layout is ``branches.contiguous()``."""
    scale, window, softcap, sinks = options
    config = known.once("tiles", lambda: pick(ATTENTION_FORWARD_GLUON, 2, q.shape[3]))
    tensors = [branches.lo if x is None else x.contiguous() for x in (sinks, *layout)]

    def describe() -> list[TensorDescriptor]:
        heads, size = heads_together(q, k), config.blocks["BLOCK_EDGE"]
        return [described(q, heads, GROUP.value // heads), described(k, 1, size), described(v, 1, size)]

    def prepare() -> Launch:
        (B, H, rows, K), G, (L, R, C) = q.shape, k.shape[1], (branches.L, branches.R, branches.C)
        heads = heads_together(q, k)
        size = 2 * GROUP.value // heads
        tiles = (cdiv(R, size) + cdiv(rows - R, size)) * (H // heads) * B
        together = pairs_together(B * G, L, 2 * K, q.element_size())
        numbers = tiles, B * G, together, G, H // G, rows, L, R, C, int(branches.full), window or 0, scale, softcap or 0.0
        kind = None if sinks is None else DTYPES[sinks.dtype]
        kinds = window is not None, softcap is not None, kind, branches.tree is not None
        tile = Tile(*map(gl.constexpr, (K, heads, *config.blocks.values(), *kinds)))
        return Launch(gluon_attention_forward, (min(tiles, processors(q.device)),), numbers, {"tile": tile})

    tiles = known.tiles(config, (q, k, v), describe)
    known.launch("forward", config, (*tiles, *tensors, out, lse), prepare)


def heads_together(q: Tensor, k: Tensor) -> int:
    """How many query heads of a key head are in one tile: a power of two."""
    group = q.shape[1] // k.shape[1]
    return min(group & -group, GROUP.value)


@gluon.jit
def fact(shared, i: gl.constexpr):
    return number(shared.numbers, i).to(gl.int32)


@gluon.jit
def pointer(shared, i: gl.constexpr, dtype: gl.constexpr):
    return number(shared.numbers, i).to(gl.pointer_type(dtype), bitcast=True)


@gluon.jit
def blocks(numbers, i):
    return Blocks(
        number(numbers, i).to(gl.int32), number(numbers, i + 1).to(gl.int32),
        number(numbers, i + 2).to(gl.int32), number(numbers, i + 3).to(gl.int32),
    )  # fmt: skip


@gluon.jit
def tile_at(index, shared, tile):
    """Batch row, key head, first query head of its group, first packed row and the row after the last of its segment."""
    HEADS: gl.constexpr = tile.HEADS
    ROWS: gl.constexpr = 2 * GROUP // HEADS
    tiles, pairs, G = fact(shared, AT_TILES), fact(shared, AT_PAIRS), fact(shared, AT_G)
    heads = fact(shared, AT_HG) // HEADS
    pair, turn = turn_of(index, tiles, pairs, fact(shared, AT_TOGETHER))
    of_pair = tiles // pairs // heads
    flat, begin, end = tile_start(turn // heads, of_pair, fact(shared, AT_L), fact(shared, AT_R), 1, ROWS)
    return (pair // G).to(gl.int64), pair % G, turn % heads * HEADS, begin + flat, end


@gluon.jit
def list_work(shared, tile):
    """Hand out the items of each tile."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = gl.arange(0, 2 * GROUP, layout=LANES)
    row = i // GROUP * (GROUP // tile.HEADS) + i % (GROUP // tile.HEADS)
    zero = gl.program_id(0) * 0
    place = Place(zero, zero + 1)
    again, careful = zero == 0, zero
    while again:
        for index in range(gl.program_id(0), fact(shared, AT_TILES), gl.num_programs(0)):
            b, g, h, m0, end = tile_at(index, shared, tile)
            m = m0 + row
            lo = pointer(shared, AT_LO, gl.int32) + b * fact(shared, AT_L)
            table = pointer(shared, AT_TABLE, gl.int32) + b * fact(shared, AT_C) * 3
            of_row = pointer(shared, AT_OF_ROW, gl.int32) + b * fact(shared, AT_R)
            tree, window = None, None
            if tile.TREE:
                tree = pointer(shared, AT_TREE, gl.int32) + b * fact(shared, AT_C) * 4
            if tile.WINDOW:
                window = fact(shared, AT_WINDOW)
            layout = Layout(lo, table, of_row, tree, None)
            seen = seen_by(m, m < end, layout, fact(shared, AT_L), fact(shared, AT_FULL_OWN), window)
            limits = bounds(seen.first, seen.last, seen.on)
            if tile.WINDOW:
                limits = window_bounds(limits, seen.oldest, seen.on, lo, gl.arange(0, 256, layout=LANES))
            text = cover(limits, tile)
            if not tile.TREE:
                place = hand_out(shared, place, seen, seen.own_first, seen.own_last, text, 0, tile)
            else:  # the text and the node of the tile's first row, then the nodes above
                start, before, full, edges = text
                node = first_node(m, seen.on, of_row, fact(shared, AT_L))
                near = node >= -1
                more = near
                while more:
                    first, last, node = keys_of_node(node, near, seen, layout, fact(shared, AT_L))
                    more = node >= 0
                    text = Blocks(start, before, full, edges)
                    place = hand_out(shared, place, seen, first, last, text, more.to(gl.int32), tile)
                    before, full, edges, near = before * 0, full * 0, edges * 0, node < -1
        again, careful = verdict(shared, careful)


@gluon.jit
def hand_out(shared, place, seen, own_first, own_last, text, more, tile):
    """An item: own keys own_first..own_last, [2 * GROUP] each, and the text's blocks. Returns the next place."""
    own = cover(bounds(own_first, own_last, seen.on), tile)
    slot, phase = place
    mbarrier.wait(shared.item_empty.index(slot), phase)
    tables, at = shared.tables, slot * TABLES
    tables.index(at + FIRST).store(seen.first)
    tables.index(at + COUNT).store(gl.where(seen.on, seen.last - seen.first + 1, 0))
    tables.index(at + OWN_FIRST).store(own_first)
    tables.index(at + OWN_COUNT).store(gl.where(seen.on, own_last - own_first + 1, 0))
    if tile.WINDOW:
        tables.index(at + OLDEST).store(seen.oldest)
    if tile.TREE:
        tables.index(at + PATH_LAST).store(seen.own_last)
        tables.index(at + PATH_FIRST).store(seen.own_first)
    numbers, at = shared.numbers, slot * NUMBERS
    put(numbers, at, own.start)
    put(numbers, at + 1, own.before)
    put(numbers, at + 2, own.full)
    put(numbers, at + 3, own.edges)
    put(numbers, at + 4, text.start)
    put(numbers, at + 5, text.before)
    put(numbers, at + 6, text.full)
    put(numbers, at + 7, text.edges)
    put(numbers, at + 8, more)
    i = gl.arange(0, 2 * GROUP, layout=own_first.type.layout)
    for part in gl.static_range(2):
        sees = seen.on & (own_first <= own_last) & (i // GROUP == part)
        put(numbers, at + 9 + 2 * part, gl.min(gl.where(sees, own_first, FAR), 0))
        put(numbers, at + 10 + 2 * part, gl.max(gl.where(sees, own_last, -1), 0))
    mbarrier.arrive(shared.item_full.index(slot), count=1)
    return after(place, BUFFERS)


@gluon.jit
def copy_keys(q_tiles, k_tiles, v_tiles, shared, tile):
    """Copy the queries of each tile, and the keys and values of each item."""
    zero = gl.program_id(0) * 0
    buffer, item, place = Place(zero, zero + 1), Place(zero, zero), Place(zero, zero + 1)
    early = zero
    again, careful = zero == 0, zero
    while again:
        for index in range(gl.program_id(0), fact(shared, AT_TILES), gl.num_programs(0)):
            b, g, h, m0, end = tile_at(index, shared, tile)
            b = b.to(gl.int32)
            row = m0 - fact(shared, AT_L) - fact(shared, AT_R) + fact(shared, AT_ROWS)
            head = g * fact(shared, AT_HG) + h
            for part in gl.static_range(2):
                at = buffer.slot * 2 + part
                mbarrier.wait(shared.q_empty.index(at), buffer.phase)
                full = shared.q_full.index(at)
                mbarrier.expect(full, q_tiles.block_type.nbytes)
                copy_tile(q_tiles, [b, head, row + part * (GROUP // tile.HEADS), 0], full, shared.q.index(at))
            buffer = after(buffer, BUFFERS)
            more = zero == 0
            while more:
                item, place, early, more = copy_item(k_tiles, v_tiles, b, g, shared, item, place, early, tile)
        again, careful = verdict(shared, careful)


@gluon.jit
def copy_item(k_tiles, v_tiles, b, g, shared, item, place, early, tile):
    """The keys of an item, in the order of ``attend_item``. Returns the next places, and whether the tile has more items."""
    BLOCK_N: gl.constexpr = tile.BLOCK_N
    BLOCK_EDGE: gl.constexpr = tile.BLOCK_EDGE
    mbarrier.wait(shared.item_full.index(item.slot), item.phase)
    numbers, at = shared.numbers, item.slot * NUMBERS
    own, text, more = blocks(numbers, at), blocks(numbers, at + 4), number(numbers, at + 8)
    mbarrier.arrive(shared.item_empty.index(item.slot), count=1)
    for j in range(own.edges + text.edges):
        n0 = gl.where(j < own.edges, edge_block(j, own, tile), edge_block(j - own.edges, text, tile))
        place, early = copy_block(k_tiles, v_tiles, b, g, n0, shared, place, early, 0, BLOCK_EDGE, tile)
    own_start = own.start + own.before * BLOCK_EDGE
    start = text.start + text.before * BLOCK_EDGE - own.full * BLOCK_N
    for j in range(own.full + text.full):
        n0 = gl.where(j < own.full, own_start, start) + j * BLOCK_N
        place, early = copy_block(k_tiles, v_tiles, b, g, n0, shared, place, early, gl.minimum(j, 1), BLOCK_N, tile)
    return after(item, BUFFERS), place, early, more > 0


@gluon.jit
def copy_block(k_tiles, v_tiles, b, g, n0, shared, place, early, is_early, KEYS: gl.constexpr, tile):
    """The KEYS keys and values from packed row n0, as tiles of BLOCK_EDGE. Returns the next place and ``early``.

    ``early`` has a bit for each slot: if it is set, the keys there were multiplied before the slot before was empty. Then the
    next keys need not wait for the values.
    """
    SIZE: gl.constexpr = tile.BLOCK_EDGE
    BYTES: gl.constexpr = KEYS // SIZE * k_tiles.block_type.nbytes
    slot, phase = place
    empty, full = shared.empty.index(slot), shared.k_full.index(slot)
    mbarrier.wait(empty, phase, pred=(early >> slot & 1) == 0)
    mbarrier.expect(full, BYTES)
    for i in gl.static_range(0, KEYS, SIZE):
        copy_tile(k_tiles, [b, g, n0 + i, 0], full, shared.k.index(slot).slice(i, SIZE))
    full = shared.v_full.index(slot)
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, BYTES)
    for i in gl.static_range(0, KEYS, SIZE):
        copy_tile(v_tiles, [b, g, n0 + i, 0], full, shared.v.index(slot).slice(i, SIZE))
    return after(place, tile.STAGES), (early & ~(1 << slot)) | (is_early << slot)


@gluon.jit
def attend(out, scale, softcap, shared, tile, PART: gl.constexpr):
    """Results of one group of rows of each tile."""
    K: gl.constexpr = tile.K
    HEADS: gl.constexpr = tile.HEADS
    dtype: gl.constexpr = out.dtype.element_ty
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, K, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    COPY: gl.constexpr = LINES(K)
    zero = gl.program_id(0) * 0
    buffer, item, place = Place(zero, zero), Place(zero, zero), Place(zero, zero)
    wrong = gl.full([GROUP], 0, gl.int32, ROW)
    again, careful = zero == 0, zero
    while again:
        for index in range(gl.program_id(0), fact(shared, AT_TILES), gl.num_programs(0)):
            top, total = start_of_softmax(index, ROW, dtype, shared, tile)
            acc = gl.full([GROUP, K], 0.0, gl.float32, OUT)
            on = gl.full([GROUP], 0, gl.int32, ROW)
            at = buffer.slot * 2 + PART
            mbarrier.wait(shared.q_full.index(at), buffer.phase)
            queries = shared.q.index(at).reshape([GROUP, K])
            more = zero == 0
            while more:
                top, total, acc, on, item, place, more = attend_item(
                    queries, top, total, acc, index, scale, softcap, dtype, careful, shared, item, place, tile, PART
                )
            poison = gl.sum(acc * 0.0, 1)
            wrong |= on * (poison != 0.0).to(gl.int32)
            if careful > 0:  # what isn't finite now is from a value that the row sees: the whole row becomes NaN
                total += poison
            total = gl.where(on > 0, total, 1.0)
            result = gl.where((on > 0)[:, None], acc * (1.0 / total)[:, None], 0.0)
            natural = gl.where(on > 0, top * LN_2 + gl.log(total), -float("inf"))
            # Through the buffer of the queries, for stores of whole lines.
            queries.store(result.to(dtype))
            result = queries.load(COPY)
            fence_async_shared()
            mbarrier.arrive(shared.q_empty.index(at), count=1)
            b, g, h, m0, end = tile_at(index, shared, tile)
            m0 += PART * (GROUP // HEADS)
            rows = fact(shared, AT_ROWS)
            row0 = m0 - fact(shared, AT_L) - fact(shared, AT_R) + rows
            at_row = ((b * fact(shared, AT_G) + g) * fact(shared, AT_HG) + h) * rows + row0
            i = gl.arange(0, GROUP, layout=ROW)
            offset = i // (GROUP // HEADS) * rows + i % (GROUP // HEADS)
            inside = m0 + i % (GROUP // HEADS) < end
            gl.store(pointer(shared, AT_LSE, gl.float32) + at_row + offset, natural, mask=inside)
            copied = gl.arange(0, GROUP, layout=gl.SliceLayout(1, COPY))
            offset = (copied // (GROUP // HEADS)).to(gl.int64) * rows + copied % (GROUP // HEADS)
            column = gl.arange(0, K, layout=gl.SliceLayout(0, COPY))
            inside = m0 + copied % (GROUP // HEADS) < end
            gl.store(out + at_row * K + (offset * K)[:, None] + column[None, :], result, mask=inside[:, None])
            buffer = after(buffer, BUFFERS)
        if careful == 0:
            put(shared.numbers, VERDICT + PART, gl.max(wrong, 0))
            mbarrier.arrive(shared.verdict.index(0), count=1)
        again, careful = verdict(shared, careful)


@gluon.jit
def verdict(shared, careful):
    """Whether the program takes its tiles again, and carefully. Waits for both groups."""
    mbarrier.wait(shared.verdict.index(0), 0)
    wrong = number(shared.numbers, VERDICT) + number(shared.numbers, VERDICT + 1)
    return (wrong > 0) & (careful == 0), careful + 1


@gluon.jit
def start_of_softmax(index, ROW: gl.constexpr, dtype: gl.constexpr, shared, tile):
    """``top`` and ``total`` of GROUP rows before their first key."""
    if tile.SINKS is not None:
        b, g, h, m0, end = tile_at(index, shared, tile)
        head = g * fact(shared, AT_HG) + h + gl.arange(0, GROUP, layout=ROW) // (GROUP // tile.HEADS)
        sink = gl.load(pointer(shared, AT_SINKS, tile.SINKS) + head).to(gl.float32) * LOG2_E
        top = gl.where(sink < LOWEST, LOWEST, sink)
        total = gl.exp2(sink - top)
    else:
        top = gl.full([GROUP], LOWEST, gl.float32, ROW)
        total = gl.full([GROUP], 0.0, gl.float32, ROW)
    return top, total


@gluon.jit
def attend_item(
    queries, top, total, acc, index, scale, softcap, dtype: gl.constexpr, careful, shared, item, place, tile, PART: gl.constexpr
):
    """``top``, ``total`` and ``acc`` after the keys of an item; which rows are on; the next places; whether more items follow.

    Edges come first, one after the other. Of whole blocks, the scores of the next are multiplied beside this one's values.
    """
    K: gl.constexpr = tile.K
    BLOCK_N: gl.constexpr = tile.BLOCK_N
    BLOCK_EDGE: gl.constexpr = tile.BLOCK_EDGE
    STAGES: gl.constexpr = tile.STAGES
    OUT: gl.constexpr = acc.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    EDGE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_EDGE, 16])
    EDGE_ROW: gl.constexpr = gl.SliceLayout(1, EDGE)
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    COPY: gl.constexpr = LINES(K)
    factor = LOG2_E if tile.SOFTCAP else scale * LOG2_E

    mbarrier.wait(shared.item_full.index(item.slot), item.phase)
    numbers, at = shared.numbers, item.slot * NUMBERS
    own, text, more = blocks(numbers, at), blocks(numbers, at + 4), number(numbers, at + 8)
    own_start = number(numbers, at + 9 + 2 * PART).to(gl.int32)
    own_stop = number(numbers, at + 10 + 2 * PART).to(gl.int32)
    tables, at = shared.tables, item.slot * TABLES
    first = tables.index(at + FIRST).slice(PART * GROUP, GROUP).load(EDGE_ROW)
    count = tables.index(at + COUNT).slice(PART * GROUP, GROUP).load(EDGE_ROW)
    own_first = tables.index(at + OWN_FIRST).slice(PART * GROUP, GROUP).load(EDGE_ROW)
    own_count = tables.index(at + OWN_COUNT).slice(PART * GROUP, GROUP).load(EDGE_ROW)
    if tile.WINDOW:
        oldest = tables.index(at + OLDEST).slice(PART * GROUP, GROUP).load(EDGE_ROW)
    if tile.TREE:
        path_last = tables.index(at + PATH_LAST).slice(PART * GROUP, GROUP).load(EDGE_ROW)
        path_first = tables.index(at + PATH_FIRST).slice(PART * GROUP, GROUP).load(EDGE_ROW)
    mbarrier.arrive(shared.item_empty.index(item.slot), count=1)
    on = gl.convert_layout(count, ROW)

    i = gl.arange(0, BLOCK_EDGE, layout=gl.SliceLayout(0, EDGE))
    for j in range(own.edges + text.edges):
        is_own = j < own.edges
        n0 = gl.where(is_own, edge_block(j, own, tile), edge_block(j - own.edges, text, tile))
        n = n0 + i
        slot, phase = place
        mbarrier.wait(shared.k_full.index(slot), phase)
        if (n0 <= own_stop) & (n0 + BLOCK_EDGE > own_start) | (j >= own.edges):
            s = multiply(queries, shared.k.index(slot).slice(0, BLOCK_EDGE), EDGE)
            s = warpgroup_mma_wait(0, deps=[s])
            s = capped(s, scale, softcap, dtype, tile)
            if careful > 0:
                mbarrier.wait(shared.v_full.index(slot), phase)
                values, poison = without_poison(shared.v.index(slot).slice(0, BLOCK_EDGE).load(COPY))
                shared.finite.index(PART).store(values)
                fence_async_shared()
                s += gl.convert_layout(poison, gl.SliceLayout(0, EDGE))[None, :]
            begin, seen = gl.where(is_own, own_first, first), gl.where(is_own, own_count, count)
            sees = in_range(n[None, :], begin[:, None], seen[:, None])
            if tile.TREE:
                L, R = fact(shared, AT_L), fact(shared, AT_R)
                path = pointer(shared, AT_PATH, gl.int32) + batch_row(index, shared) * R * 2
                window = 1 if tile.WINDOW else None
                seen_on_path = Seen(first, count, path_first, path_last, None, None)
                sees &= on_path(n, seen_on_path, path, Sizes(L, L + R, window, None, None))
            if tile.WINDOW:
                L = fact(shared, AT_L)
                lo = pointer(shared, AT_LO, gl.int32) + batch_row(index, shared) * L
                position = n - gl.load(lo + n, mask=n < L, other=0)
                sees &= is_own | (position[None, :] >= oldest[:, None])
            s = gl.where(sees, s, -float("inf"))
            p, top, total, decay = softmax(s, factor, top, total, ROW)
            acc = acc * decay[:, None]
            p = gl.convert_layout(p.to(dtype), WEIGHTS)
            mbarrier.wait(shared.v_full.index(slot), phase)
            if careful > 0:
                acc = warpgroup_mma(p, shared.finite.index(PART), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
            else:
                acc = warpgroup_mma(p, shared.v.index(slot).slice(0, BLOCK_EDGE), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
        else:  # none of the group's rows sees a key
            mbarrier.wait(shared.v_full.index(slot), phase)
        mbarrier.arrive(shared.empty.index(slot), count=1)
        place = after(place, STAGES)

    whole = own.full + text.full
    if whole > 0:
        mbarrier.wait(shared.k_full.index(place.slot), place.phase)
        s = multiply(queries, shared.k.index(place.slot), WHOLE)
        s = warpgroup_mma_wait(0, deps=[s])
        p, top, total, decay = softmax(capped(s, scale, softcap, dtype, tile), factor, top, total, ROW)
        acc = acc * decay[:, None]
        p = gl.convert_layout(p.to(dtype), WEIGHTS)
        for _ in range(whole - 1):
            slot, phase = place
            place = after(place, STAGES)
            mbarrier.wait(shared.k_full.index(place.slot), place.phase)
            s = multiply(queries, shared.k.index(place.slot), WHOLE)
            mbarrier.wait(shared.v_full.index(slot), phase)
            adding = warpgroup_mma(p, shared.v.index(slot), acc, is_async=True)
            s, acc = warpgroup_mma_wait(0, deps=[s, adding])
            mbarrier.arrive(shared.empty.index(slot), count=1)
            p, top, total, decay = softmax(capped(s, scale, softcap, dtype, tile), factor, top, total, ROW)
            acc = acc * decay[:, None]
            p = gl.convert_layout(p.to(dtype), WEIGHTS)
        mbarrier.wait(shared.v_full.index(place.slot), place.phase)
        acc = warpgroup_mma(p, shared.v.index(place.slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(shared.empty.index(place.slot), count=1)
        place = after(place, STAGES)
    return top, total, acc, on, after(item, BUFFERS), place, more > 0


@gluon.jit
def batch_row(index, shared):
    pair, _ = turn_of(index, fact(shared, AT_TILES), fact(shared, AT_PAIRS), fact(shared, AT_TOGETHER))
    return (pair // fact(shared, AT_G)).to(gl.int64)


@gluon.jit
def multiply(queries, keys, layout: gl.constexpr):
    """queries [GROUP,K] times keys [keys,K]: begins to compute [GROUP,keys]."""
    nothing = gl.full([GROUP, keys.shape[0]], 0.0, gl.float32, layout)
    return warpgroup_mma(queries, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def capped(s, scale, softcap, dtype: gl.constexpr, tile):
    return softcap * bend(s * (scale / softcap), dtype) if tile.SOFTCAP else s


@gluon.jit
def softmax(s, factor, top, total, ROW: gl.constexpr):
    """Weights of scores s, times ``factor`` in units of log 2, and ``top`` and ``total`` after them: see ``softmax_step``."""
    new_top = gl.maximum(top, gl.convert_layout(gl.max(s, 1), ROW) * factor)
    p = gl.exp2(s * factor - gl.convert_layout(new_top, gl.SliceLayout(1, s.type.layout))[:, None])
    decay = gl.exp2(top - new_top)
    return p, new_top, total * decay + gl.convert_layout(gl.sum(p, 1), ROW), decay


@gluon.jit(
    do_not_specialize=["tiles", "pairs", "together", "G", "HG", "rows", "L", "R", "C", "full_own", "window"],
    do_not_specialize_on_alignment=["sinks", "lo", "table", "of_row", "tree", "path"],
)
def gluon_attention_forward(
    q_tiles, k_tiles, v_tiles, sinks, lo, table, of_row, tree, path, out, lse,
    tiles, pairs, together, G, HG, rows, L, R, C, full_own, window, scale, softcap, tile,
):  # fmt: skip
    K: gl.constexpr = tile.K
    HEADS: gl.constexpr = tile.HEADS
    BLOCK_N: gl.constexpr = tile.BLOCK_N
    STAGES: gl.constexpr = tile.STAGES
    dtype: gl.constexpr = out.dtype.element_ty
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, K], dtype)
    facts = (
        sinks, lo, table, of_row, tree, path, lse, tiles, pairs, together, G, HG, rows, L, R, C, full_own, window,
    )  # fmt: skip
    numbers = gl.allocate_shared_memory(gl.int64, [FACTS + len(facts), 1], PLAIN)
    for i in gl.static_range(len(facts)):
        put(numbers, FACTS + i, gl.to_tensor(facts[i]).to(gl.int64))
    shared = Shared(
        gl.allocate_shared_memory(dtype, [2 * BUFFERS, 1, HEADS, GROUP // HEADS, K], q_tiles.layout),
        barriers(2 * BUFFERS, 1),
        barriers(2 * BUFFERS, 1),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, K], KEYS),
        barriers(STAGES, 1),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, K], KEYS),
        barriers(STAGES, 1),
        barriers(STAGES, 2),
        gl.allocate_shared_memory(gl.int32, [BUFFERS * TABLES, 2 * GROUP], PLAIN),
        numbers,
        barriers(BUFFERS, 1),
        barriers(BUFFERS, 3),
        gl.allocate_shared_memory(dtype, [2, tile.BLOCK_EDGE, K], KEYS),
        barriers(1, 2),
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (attend, (out, scale, softcap, shared, tile, 0)),
            (attend, (out, scale, softcap, shared, tile, 1)),
            (copy_keys, (q_tiles, k_tiles, v_tiles, shared, tile)),
            (list_work, (shared, tile)),
        ],
        [4, 1, 1],
        [REGISTERS, OTHERS, OTHERS],
    )
