"""Forward of thought_attention: a program takes BLOCK_M query rows of one key head and loops over their keys, block by block.

The H/G query heads of a key head are folded into the rows: flat row f is row f // HG under head f % HG. No tile has both text
rows and branch rows. The keys of a tile are the own rows from the first to the last that a row of the tile sees, and the text
from the first to the last, in this order:

1. of both, those at the edges, which only some rows see, in masked blocks of BLOCK_EDGE;
2. of both, those that all rows see, in blocks of BLOCK_N without a mask.

In a tree these are the own rows from the first of the node of the tile's first row. Those of the nodes above follow, node by
node upwards: what lies between is never read.

If branches are short, only few of the own keys of a tile belong to any one row. Still, all rows are multiplied with all of
them: wide products take fewer instructions than small ones of each row with its own keys, and the matrix unit has time to spare
(docs/log.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._options import AttentionOptions
from ...branches import Branches
from .. import gluon_is_on, gluon_why_not
from .._device import (
    LN_2,
    LOG2_E,
    LOWEST,
    Blocks,
    Layout,
    Sizes,
    Stride,
    bounds,
    cover,
    edge_block,
    first_node,
    in_range,
    keys_of_node,
    load_rows,
    load_tile,
    on_path,
    scores,
    seen_by,
    softmax_step,
    store_tile,
    taking_turns,
    tile_rows,
    tile_rows_again,
    tile_start,
    window_bounds,
    without_poison,
)
from .._launch import Launch, Plan, cdiv, has_tiles, key_tiles, pairs_together, plan, tile_of
from ..configs import (
    ATTENTION_FORWARD,
    ATTENTION_FORWARD_LONG,
    ATTENTION_FORWARD_OPTIONS,
    ATTENTION_FORWARD_TREE,
    LONG_TEXT,
    Config,
    pick,
    target,
)


class DescribedKeys(NamedTuple):
    """As ``Keys``, of batch row b and key head g, with descriptors for tiles of BLOCK_N and BLOCK_EDGE keys; or None."""

    k: Any
    v: Any
    stride_k: Any
    stride_v: Any
    k_full: Any
    v_full: Any
    k_edge: Any
    v_edge: Any
    b: Any
    g: Any


def thought_attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Implements ``reference.thought_attention``."""
    scale, window, softcap, sinks = options
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    out = q.new_empty((B, H, rows, E))
    lse = q.new_empty((B, H, rows), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    sinks = None if sinks is None else sinks.contiguous()
    layout = branches.contiguous()
    on = gluon_is_on()
    known = plan("thought_attention", (q, k, v, sinks, *layout), branches.full, scale, window, softcap, on)
    if on and gluon_serves(known, q, k, v):
        from . import gluon_forward  # imports Gluon

        gluon_forward.launch(q, k, v, branches, layout, options, out, lse, known)
        return out, lse

    def choose() -> Config:
        first = ATTENTION_FORWARD_LONG if branches.L > LONG_TEXT else ATTENTION_FORWARD
        if branches.tree is not None:
            first = ATTENTION_FORWARD_TREE
        elif window is not None or softcap is not None or sinks is not None:
            first = ATTENTION_FORWARD_OPTIONS
        return pick([first, ATTENTION_FORWARD], q.element_size(), max(K, E))

    config = known.once("tiles", choose)

    def prepare() -> Launch:
        HG, BLOCK_M, R = H // G, config.blocks["BLOCK_M"], branches.R
        tiles = cdiv(R * HG, BLOCK_M) + cdiv((rows - R) * HG, BLOCK_M)
        numbers = (
            tuple(Stride(*x.stride()[:3]) for x in (q, k, v, out)),
            B, G, pairs_together(B * G, branches.L, K + E, q.element_size()),
            HG, rows, branches.L, R, branches.C, int(branches.full), window, scale, softcap,
        )  # fmt: skip
        return Launch(attention_forward, (tiles * B * G,), numbers, {"tile": tile_of(config, K, E)})

    tiles = key_tiles(k, v, config, known, "BLOCK_N", "BLOCK_EDGE")
    known.launch("forward", config, (q, k, v, *tiles, sinks, *layout, out, lse), prepare)
    return out, lse


def gluon_serves(known: Plan, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether kernels in Gluon serve these tensors, all of which they copy by tiles."""

    def choose() -> bool:
        tiled = all(map(has_tiles, (q, k, v, *others)))
        return tiled and gluon_why_not(target(), q.dtype, q.shape[-1], v.shape[-1]) is None

    return known.once("in Gluon", choose)


@triton.jit(
    do_not_specialize=["B", "G", "together", "HG", "rows", "L", "R", "C", "full_own", "window"],
    do_not_specialize_on_alignment=["sinks", "lo", "table", "of_row", "tree", "path"],
)
def attention_forward(
    q, k, v, k_full, v_full, k_edge, v_edge, sinks, lo, table, of_row, tree, path, out, lse, strides,
    B, G, together, HG, rows, L, R, C, full_own, window, scale, softcap, tile,
):  # fmt: skip
    stride_q, stride_k, stride_v, stride_o = strides
    sizes = Sizes(L, L + R, window, scale, softcap)
    pair, index = taking_turns(B * G, together)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    tiles = tl.num_programs(0) // (B * G)
    flat, begin, end = tile_start(index, tiles, L, R, HG, tile.BLOCK_M)
    m, h, inside = tile_rows(flat, begin, end, HG, tile.BLOCK_M)
    k += b * stride_k.b + g * stride_k.h
    v += b * stride_v.b + g * stride_v.h
    keys = DescribedKeys(k, v, stride_k.m, stride_v.m, k_full, v_full, k_edge, v_edge, b, g)
    if tree is not None:
        tree += b * C * 4
        path += b * R * 2
    layout = Layout(lo + b * L, table + b * C * 3, of_row + b * R, tree, path)
    node = 0
    seen = seen_by(m, inside, layout, L, full_own, window)
    if tree is not None:
        node = first_node(m, seen.on, layout.of_row, L)

    skipped = L + R - rows  # packed rows before the first query row
    q += b * stride_q.b + g * HG * stride_q.h
    offsets = h.to(tl.int64) * stride_q.h + (m - skipped).to(tl.int64) * stride_q.m
    queries = load_tile(q, offsets, inside, tile.K, tile.BLOCK_K)  # [BLOCK_M, BLOCK_K]
    factor = scale * LOG2_E if softcap is None else LOG2_E
    if sinks is None:
        top = tl.full([tile.BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([tile.BLOCK_M], tl.float32)
    else:
        sink = tl.load(sinks + g * HG + h, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        top = tl.where(sink < LOWEST, LOWEST, sink)
        total = tl.exp2(sink - top)

    limits = bounds(seen.first, seen.last, seen.on)
    if window is not None:
        limits = window_bounds(limits, seen.oldest, seen.on, layout.lo, tl.arange(0, 1024))
    text = cover(limits, tile)
    end_top, end_total, acc = over_keys(
        queries, top, total, seen, keys, layout, node, text, sizes, factor, tile, tile.CAREFUL, None
    )
    # Because of 0 * NaN, a value that isn't finite also changes rows that don't see it. Then start over, and check all values.
    if not tile.CAREFUL:  # noqa: SIM102, one condition is the compiler's, one the program's
        if tl.max((seen.on & (tl.sum(acc * 0.0, 1) != 0.0)).to(tl.int32), 0) > 0:
            end_top, end_total, acc = over_keys(
                queries, top, total, seen, keys, layout, node, text, sizes, factor, tile, True, 1
            )

    zero = tl.minimum(L, 0)  # where the result goes is computed again: see tile_rows_again
    pair, index = taking_turns(B * G + zero, together)
    flat, begin, end = tile_start(index, tl.num_programs(0) // (B * G + zero), L, R + zero, HG, tile.BLOCK_M)
    m, h, inside = tile_rows_again(zero, flat, begin, end, HG, tile.BLOCK_M)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    row = m - skipped
    total = tl.where(seen.on, end_total, 1.0)
    result = tl.where(seen.on[:, None], acc * (1.0 / total)[:, None], 0.0)  # [BLOCK_M, BLOCK_E]
    out += b * stride_o.b + g * HG * stride_o.h
    offsets = h.to(tl.int64) * stride_o.h + row.to(tl.int64) * stride_o.m
    store_tile(out, offsets, inside, result, tile.E, tile.BLOCK_E)
    natural = tl.where(seen.on, end_top * LN_2 + tl.log(total), -float("inf"))
    tl.store(lse + (pair.to(tl.int64) * HG + h) * rows + row, natural, mask=inside)


@triton.jit
def over_keys(
    queries, top, total, seen, keys, layout, node, text, sizes, factor, tile, CAREFUL: tl.constexpr, STAGES: tl.constexpr
):
    """``top``, ``total`` and acc after all keys of the tile, which are copied in STAGES.

    With CAREFUL, values that aren't finite don't reach rows that don't see them.
    """
    acc = tl.zeros([queries.shape[0], tile.BLOCK_E], tl.float32)
    if layout.tree is None:
        top, total, acc = over_blocks(
            queries, top, total, acc, seen, seen.own_first, seen.own_last, keys, layout, text, sizes, factor, tile,
            CAREFUL, STAGES,
        )  # fmt: skip
    else:  # the text and the node of the tile's first row, then the nodes above
        start, before, full, edges = text
        near = node >= -1
        more = near
        while more:
            first, last, node = keys_of_node(node, near, seen, layout, sizes.L)
            text = Blocks(start, before, full, edges)
            top, total, acc = over_blocks(
                queries, top, total, acc, seen, first, last, keys, layout, text, sizes, factor, tile, CAREFUL, STAGES
            )
            before, full, edges, near = before * 0, full * 0, edges * 0, node < -1
            more = node >= 0
    if CAREFUL:  # what isn't finite now is from a value that the row sees: the whole row becomes NaN
        total += tl.sum(acc * 0.0, 1)
    return top, total, acc


@triton.jit
def over_blocks(
    queries, top, total, acc, seen, own_first, own_last, keys, layout, text, sizes, factor, tile,
    CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same after own keys own_first..own_last, [rows] each, and the text's blocks."""
    own_limits = bounds(own_first, own_last, seen.on)
    own = cover(own_limits, tile)
    i = tl.arange(0, tile.BLOCK_EDGE)
    for j in tl.range(own.edges + text.edges, num_stages=STAGES):
        is_own = j < own.edges
        own_n0 = edge_block(j, own, tile)
        n0 = tl.where(is_own, own_n0, edge_block(j - own.edges, text, tile))
        n = n0 + i
        k, v = load_keys(keys, keys.k_edge, keys.v_edge, n0, sizes.M, tile.BLOCK_EDGE, tile)
        s = scores(queries, k, sizes.scale, sizes.softcap, tile.SLICES, tile.PRECISION)  # [BLOCK_M, BLOCK_EDGE]
        begin = tl.where(is_own, own_first, seen.first)
        count = tl.where(is_own, own_last, seen.last) - begin + 1
        sees = in_range(n[None, :], begin[:, None], count[:, None])
        if layout.path is not None:
            sees &= on_path(n, seen, layout.path, sizes)
        if sizes.window is not None:
            position = n - tl.load(layout.lo + n, mask=n < sizes.L, other=0)
            sees &= is_own | (position[None, :] >= seen.oldest[:, None])
        if CAREFUL:
            v, poison = without_poison(v)
            s += poison[None, :]
        s = tl.where(sees, s, -float("inf"))
        top, total, acc = softmax_step(s, v, factor, top, total, acc, tile.PRECISION)

    own_start = own.start + own.before * tile.BLOCK_EDGE
    start = text.start + (text.before * tile.BLOCK_EDGE - own.full * tile.BLOCK_N)
    for j in tl.range(own.full + text.full, num_stages=STAGES):
        n0 = tl.where(j < own.full, own_start, start) + j * tile.BLOCK_N
        k, v = load_keys(keys, keys.k_full, keys.v_full, n0, sizes.M, tile.BLOCK_N, tile)
        s = scores(queries, k, sizes.scale, sizes.softcap, tile.SLICES, tile.PRECISION)  # [BLOCK_M, BLOCK_N]
        top, total, acc = softmax_step(s, v, factor, top, total, acc, tile.PRECISION)
    return top, total, acc


@triton.jit
def load_keys(keys, k_tiles, v_tiles, n0, M, ROWS: tl.constexpr, tile):
    """The ROWS keys and values from packed row ``n0``: [ROWS, BLOCK_K] and [ROWS, BLOCK_E]."""
    k = load_rows(k_tiles, keys.k, keys.b, keys.g, n0, keys.stride_k, M, ROWS, tile.K, tile.BLOCK_K)
    v = load_rows(v_tiles, keys.v, keys.b, keys.g, n0, keys.stride_v, M, ROWS, tile.E, tile.BLOCK_E)
    return k, v
