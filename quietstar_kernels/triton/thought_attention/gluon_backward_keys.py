"""Gradients of the text's keys and values in Gluon, for Hopper: as in ``backward_keys``, with twice the rows in a turn.

A program takes 128 keys of one head. Its partitions:

- ``list_rows``, a warp, reads the tables of the query rows;
- ``copy_rows``, a warp, copies the keys and values once, then the queries and gradients of GROUP rows at a time into a ring;
- two ``sum_rows``, each a warp group, multiply 64 of the keys with them. Scores are transposed: [keys,rows]. A group passes
  over rows that see none of its keys.

Who has written a slot arrives at its barrier "full", and who has read it at "empty".
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._device import FAR
from .._gluon import (
    GROUP,
    LINES,
    Place,
    after,
    barriers,
    copy_tile,
    described,
    in_range,
    number,
    put,
    row_tile,
    turn_of,
    wait_for_group,
    weights,
)
from .._launch import Launch, cdiv, pairs_together
from ..configs import ATTENTION_BACKWARD_KEYS_GLUON, pick
from .backward import Inputs

REGISTERS, OTHERS = gl.constexpr(240), gl.constexpr(24)  # of a thread of ``sum_rows``, and of the other two
TABLES = gl.constexpr(5)  # of GROUP rows:
LSE, DELTA, FIRST, COUNT, OLDEST = (gl.constexpr(i) for i in range(5))
NUMBERS = gl.constexpr(3)  # of GROUP rows: whether one adds nothing, and for each group of keys one of these:
NONE, SOME, ALL = (gl.constexpr(i) for i in range(3))  # what the rows see of the keys


class Shared(NamedTuple):
    """Shared memory, with the barriers of the ring."""

    k: Any  # [2, GROUP, K], of both groups, as v
    v: Any
    k_full: Any  # one barrier, of both
    q: Any  # [STAGES, GROUP, K]
    grads: Any
    tables: Any  # fp32 or the bits of int32 [STAGES * TABLES, GROUP]
    numbers: Any  # int64 [STAGES * NUMBERS, 1]
    full: Any
    empty: Any


class Tile(NamedTuple):
    """What a kernel is compiled for, each a ``gl.constexpr``."""

    K: Any
    STAGES: Any
    WINDOW: Any
    SOFTCAP: Any


class Walk(NamedTuple):
    """The flat tiles begin..stop - 1 of query rows: ``tiles`` of each head, of which text comes first."""

    begin: Any
    stop: Any
    tiles: Any
    text_tiles: Any
    text_start: Any
    text_end: Any
    own_start: Any
    own_end: Any


def launch(inputs: Inputs, ranges: Tensor, dk: Tensor, dv: Tensor, parts: int) -> None:
    """Write dk and dv [parts,B,G,L,K] in fp32. ``ranges`` [B,L/GROUP,3] are those of ``row_ranges`` for GROUP keys."""
    grad_out, q, k, v, branches, layout, (scale, window, softcap, _), tables, known, _ = inputs
    config = known.once("text keys", lambda: pick(ATTENTION_BACKWARD_KEYS_GLUON, 2, q.shape[3]))

    def describe() -> list[TensorDescriptor]:
        return [described(x, 1, GROUP.value) for x in (q, grad_out, k, v)]

    def prepare() -> Launch:
        (B, H, rows, K), G, L = q.shape, k.shape[1], branches.L
        together = pairs_together(B * G, H // G * rows, 2 * K, q.element_size())
        numbers = B * G, together, G, H // G, rows, L, branches.M, parts, scale, softcap or 0.0
        tile = Tile(*map(gl.constexpr, (K, *config.blocks.values(), window is not None, softcap is not None)))
        return Launch(gluon_attention_text_keys, (cdiv(L, 2 * GROUP.value) * parts * B * G,), numbers, {"tile": tile})

    tiles = known.tiles(config, (q, grad_out, k, v), describe)
    oldest = tables.first if tables.oldest is None else tables.oldest
    rows = tables.lse, tables.delta, tables.first, tables.text_count, oldest
    known.launch("text keys", config, (*tiles, *rows, layout[0], ranges, dk, dv), prepare)


@gluon.jit
def rows_of_turn(turn, walk):
    """The head in its group, the first query row of the turn's tile, and the row after the last."""
    row0, row_end = row_tile(
        turn % walk.tiles, walk.text_tiles, walk.text_start, walk.text_end, walk.own_start, walk.own_end, GROUP
    )
    return turn // walk.tiles, row0, row_end


@gluon.jit
def list_rows(lse, delta, first, count, oldest, n0, L, rows, shared, walk, tile):
    """Hand out the tables of each tile of rows. The pointers are those of the batch row, and lse, delta of the first head."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = gl.arange(0, GROUP, layout=LANES)
    zero = gl.program_id(0) * 0
    place = Place(zero, zero + 1)
    for turn in range(walk.begin, walk.stop):
        h, row0, row_end = rows_of_turn(turn, walk)
        inside = i < row_end - row0
        at = h * rows + row0
        row_lse = gl.load(lse + at + i, mask=inside, other=float("inf"))
        adds = row_lse < float("inf")
        row_first = gl.load(first + row0 + i)
        row_count = gl.where(adds, gl.load(count + row0 + i), 0)
        row_delta = gl.load(delta + at + i)
        slot, phase = place
        mbarrier.wait(shared.empty.index(slot), phase)
        tables = shared.tables
        tables.index(slot * TABLES + LSE).store(row_lse)
        tables.index(slot * TABLES + DELTA).store(row_delta)
        tables.index(slot * TABLES + FIRST).store(row_first.to(gl.float32, bitcast=True))
        tables.index(slot * TABLES + COUNT).store(row_count.to(gl.float32, bitcast=True))
        if tile.WINDOW:
            row_oldest = gl.load(oldest + row0 + i)
            tables.index(slot * TABLES + OLDEST).store(row_oldest.to(gl.float32, bitcast=True))
        start = gl.min(gl.where(row_count > 0, row_first, FAR), 0)
        all_from = gl.max(row_first, 0)
        all_to = gl.min(row_first + row_count, 0)
        end = gl.max(gl.where(row_count > 0, row_first + row_count, 0), 0)
        put(shared.numbers, slot * NUMBERS, gl.max(gl.where(adds, 0, 1), 0))
        for part in gl.static_range(2):
            n = n0 + part * GROUP
            seen = gl.where((start < n + GROUP) & (end > n) & (n < L), SOME, NONE)
            if not tile.WINDOW:
                seen = gl.where((all_from <= n) & (all_to >= n + GROUP), ALL, seen)
            put(shared.numbers, slot * NUMBERS + 1 + part, seen)
        mbarrier.arrive(shared.full.index(slot), count=1)
        place = after(place, tile.STAGES)


@gluon.jit
def copy_rows(q_tiles, grad_tiles, k_tiles, v_tiles, b, g, n0, HG, shared, walk, tile):
    """Copy the keys and values, and the queries and gradients of each tile of rows."""
    full = shared.k_full.index(0)
    mbarrier.expect(full, 4 * k_tiles.block_type.nbytes)
    for part in gl.static_range(2):
        copy_tile(k_tiles, [b, g, n0 + part * GROUP, 0], full, shared.k.index(part))
        copy_tile(v_tiles, [b, g, n0 + part * GROUP, 0], full, shared.v.index(part))
    zero = gl.program_id(0) * 0
    place = Place(zero, zero + 1)
    for turn in range(walk.begin, walk.stop):
        h, row0, row_end = rows_of_turn(turn, walk)
        slot, phase = place
        mbarrier.wait(shared.empty.index(slot), phase)
        full = shared.full.index(slot)
        mbarrier.expect(full, 2 * q_tiles.block_type.nbytes)
        copy_tile(q_tiles, [b, g * HG + h, row0, 0], full, shared.q.index(slot))
        copy_tile(grad_tiles, [b, g * HG + h, row0, 0], full, shared.grads.index(slot))
        place = after(place, tile.STAGES)


@gluon.jit
def sum_rows(dk, dv, lo, n0, L, scale, softcap, shared, walk, tile, PART: gl.constexpr):
    """dk and dv of one group of keys. The pointers are those of the program's part and head, and lo of the batch row."""
    K: gl.constexpr = tile.K
    dtype: gl.constexpr = shared.q.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, GROUP, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, K, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    n0 += PART * GROUP
    n = n0 + gl.arange(0, GROUP, layout=gl.SliceLayout(1, SCORES))
    position = n
    if tile.WINDOW:
        position = n - gl.load(lo + n, mask=n < L, other=0)
    dk_sum = gl.full([GROUP, K], 0.0, gl.float32, SUMS)
    dv_sum = gl.full([GROUP, K], 0.0, gl.float32, SUMS)
    zero = gl.program_id(0) * 0
    place = Place(zero, zero)
    mbarrier.wait(shared.k_full.index(0), 0)
    keys, values = shared.k.index(PART), shared.v.index(PART)
    for _ in range(walk.begin, walk.stop):
        slot, phase = place
        mbarrier.wait(shared.full.index(slot), phase)
        q, grads = shared.q.index(slot), shared.grads.index(slot)
        tables = shared.tables
        seen = number(shared.numbers, slot * NUMBERS + 1 + PART)
        if seen > NONE:
            if number(shared.numbers, slot * NUMBERS) > 0:  # rows that add nothing may hold NaN
                without_rows(q, grads, tables, slot * TABLES + LSE, K)
            nothing = gl.full([GROUP, GROUP], 0.0, gl.float32, SCORES)
            qk = warpgroup_mma(keys, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if not tile.SOFTCAP:  # whose products come one by one, for want of registers
                dp = warpgroup_mma(values, grads.permute((1, 0)), nothing, use_acc=False, is_async=True)
            lse = tables.index(slot * TABLES + LSE).load(ROW)
            qk = warpgroup_mma_wait(0 if tile.SOFTCAP else 1, deps=[qk])
            p, slope = weights(qk, lse[None, :], scale, softcap if tile.SOFTCAP else None, dtype)
            if seen == SOME:
                first = tables.index(slot * TABLES + FIRST).load(ROW).to(gl.int32, bitcast=True)
                count = tables.index(slot * TABLES + COUNT).load(ROW).to(gl.int32, bitcast=True)
                sees = in_range(n[:, None], first[None, :], count[None, :])
                if tile.WINDOW:
                    oldest = tables.index(slot * TABLES + OLDEST).load(ROW).to(gl.int32, bitcast=True)
                    sees = sees & (position[:, None] >= oldest[None, :])
                p = gl.where(sees, p, 0.0)
            rounded = gl.convert_layout(p.to(dtype), WEIGHTS)
            p = p * slope
            if tile.SOFTCAP:
                dv_sum = warpgroup_mma(rounded, grads, dv_sum, is_async=True)
                dv_sum = warpgroup_mma_wait(0, deps=[dv_sum])
                dp = warpgroup_mma(values, grads.permute((1, 0)), nothing, use_acc=False, is_async=True)
            dp = warpgroup_mma_wait(0, deps=[dp])
            if not tile.SOFTCAP:
                dv_sum = warpgroup_mma(rounded, grads, dv_sum, is_async=True)
            delta = tables.index(slot * TABLES + DELTA).load(ROW)
            # Where p is not 0 the row sees the key, and dp is finite.
            ds = gl.where(p > 0.0, p * (dp - delta[None, :]), 0.0)
            dk_sum = warpgroup_mma(gl.convert_layout(ds.to(dtype), WEIGHTS), q, dk_sum, is_async=True)
            dk_sum, dv_sum = warpgroup_mma_wait(0, deps=[dk_sum, dv_sum])
        mbarrier.arrive(shared.empty.index(slot), count=1)
        place = after(place, tile.STAGES)

    i = gl.arange(0, GROUP, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, K, layout=gl.SliceLayout(0, SUMS))
    offset = ((n0 + i) * K)[:, None] + column[None, :]
    gl.store(dk + offset, dk_sum * scale, mask=(n0 + i < L)[:, None])
    gl.store(dv + offset, dv_sum, mask=(n0 + i < L)[:, None])


@gluon.jit
def without_rows(q, grads, tables, at, K: gl.constexpr):
    """Make rows 0 whose log-sum-exp is inf, for the products. Both groups do so, and write the same."""
    lines: gl.constexpr = LINES(K)
    adds = (tables.index(at).load(gl.SliceLayout(1, lines)) < float("inf"))[:, None]
    kept_q, kept_grads = gl.where(adds, q.load(lines), 0.0), gl.where(adds, grads.load(lines), 0.0)
    q.store(kept_q)
    grads.store(kept_grads)
    fence_async_shared()
    wait_for_group()  # here, so that no other turn has a barrier for it


@gluon.jit(
    do_not_specialize=["pairs", "together", "G", "HG", "rows", "L", "M", "parts"],
    do_not_specialize_on_alignment=["lse", "delta", "first", "count", "oldest", "lo"],
)
def gluon_attention_text_keys(
    q_tiles, grad_tiles, k_tiles, v_tiles, lse, delta, first, count, oldest, lo, ranges, dk, dv,
    pairs, together, G, HG, rows, L, M, parts, scale, softcap, tile,
):  # fmt: skip
    K: gl.constexpr = tile.K
    STAGES: gl.constexpr = tile.STAGES
    dtype: gl.constexpr = q_tiles.dtype
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, K], dtype)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    pair, turn = turn_of(gl.program_id(0), gl.num_programs(0), pairs, together)
    b, g = pair // G, pair % G
    part, block = turn % parts, turn // parts
    n0 = block * 2 * GROUP
    # The rows that may see any key of the two groups.
    groups = (L + GROUP - 1) // GROUP
    ranges += (b.to(gl.int64) * groups + block * 2) * 3
    second = block * 2 + 1 < groups
    text_end = gl.maximum(gl.load(ranges), gl.load(ranges + 3, mask=second, other=0))
    own_start, own_end = gl.load(ranges + 1), gl.load(ranges + 2)
    other_start, other_end = gl.load(ranges + 4, mask=second, other=0), gl.load(ranges + 5, mask=second, other=0)
    own_start = gl.where(own_start < own_end, own_start, other_start)
    own_start = gl.where(other_start < other_end, gl.minimum(own_start, other_start), own_start)
    own_end = gl.maximum(own_end, other_end)
    before = rows - (M - L)  # query rows before the first branch row
    text_tiles = gl.maximum(text_end - n0 + GROUP - 1, 0) // GROUP
    tiles = text_tiles + (own_end - own_start + GROUP - 1) // GROUP
    begin, stop = part * HG * tiles // parts, (part + 1) * HG * tiles // parts
    walk = Walk(begin, stop, tiles, text_tiles, n0, text_end, own_start + before, own_end + before)

    shared = Shared(
        gl.allocate_shared_memory(dtype, [2, GROUP, K], KEYS),
        gl.allocate_shared_memory(dtype, [2, GROUP, K], KEYS),
        barriers(1, 1),
        gl.allocate_shared_memory(dtype, [STAGES, GROUP, K], KEYS),
        gl.allocate_shared_memory(dtype, [STAGES, GROUP, K], KEYS),
        gl.allocate_shared_memory(gl.float32, [STAGES * TABLES, GROUP], PLAIN),
        gl.allocate_shared_memory(gl.int64, [STAGES * NUMBERS, 1], PLAIN),
        barriers(STAGES, 2),
        barriers(STAGES, 2),
    )
    fence_async_shared()
    head = pair.to(gl.int64) * HG * rows
    lse += head
    delta += head
    row = b.to(gl.int64) * rows
    first += row
    count += row
    oldest += row
    lo += b.to(gl.int64) * L
    sums = (part * pairs + pair).to(gl.int64) * L * K
    dk += sums
    dv += sums
    gl.warp_specialize(
        [
            (sum_rows, (dk, dv, lo, n0, L, scale, softcap, shared, walk, tile, 0)),
            (sum_rows, (dk, dv, lo, n0, L, scale, softcap, shared, walk, tile, 1)),
            (copy_rows, (q_tiles, grad_tiles, k_tiles, v_tiles, b, g, n0, HG, shared, walk, tile)),
            (list_rows, (lse, delta, first, count, oldest, n0, L, rows, shared, walk, tile)),
        ],
        [4, 1, 1],
        [REGISTERS, OTHERS, OTHERS],
    )
