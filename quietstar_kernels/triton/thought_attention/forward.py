"""Forward of thought_attention: a program takes BLOCK_M query rows of one key head and loops over their keys, block by block.

The H/G query heads of a key head are folded into the rows: flat row f is row f // HG under head f % HG. No tile has both text
rows and branch rows. The keys of a tile are the own rows from the first that a row of the tile sees to the last, and the text
likewise, in this order:

1. of both, those at the edges, which only some rows see, in masked blocks of BLOCK_EDGE;
2. of both, those that all rows see, in blocks of BLOCK_N without a mask.

In a tree these are the own rows from the first of the node of the tile's first row. Those of the nodes above follow, node by
node upwards: what lies between is never read.

If branches are short, only few of the own keys of a tile belong to any one row. Still, all rows are multiplied with all of
them: wide products take fewer instructions than small ones of each row with its own keys, and the matrix unit has time to spare
(docs/log.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._options import AttentionOptions
from ...branches import Branches
from .._device import (
    LN_2,
    LOG2_E,
    LOWEST,
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
from .._launch import Launch, cdiv, key_tiles, padded, pairs_together, plan
from ..configs import (
    ATTENTION_FORWARD,
    ATTENTION_FORWARD_LONG,
    ATTENTION_FORWARD_OPTIONS,
    ATTENTION_FORWARD_TREE,
    LONG_TEXT,
    dot_precision,
    pick,
)


def thought_attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """As ``reference.thought_attention``."""
    scale, window, softcap, sinks = options
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    out = q.new_empty((B, H, rows, E))
    lse = q.new_empty((B, H, rows), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    first = ATTENTION_FORWARD_LONG if branches.L > LONG_TEXT else ATTENTION_FORWARD
    if branches.tree is not None:
        first = ATTENTION_FORWARD_TREE
    elif window is not None or softcap is not None or sinks is not None:
        first = ATTENTION_FORWARD_OPTIONS
    config = pick([first, ATTENTION_FORWARD], q.element_size(), max(K, E))
    layout = branches.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    known = plan("thought_attention", (q, k, v, sinks, *layout), branches.full, scale, window, softcap)

    def prepare() -> Launch:
        HG, BLOCK_M, R = H // G, config.blocks["BLOCK_M"], branches.R
        tiles = cdiv(R * HG, BLOCK_M) + cdiv((rows - R) * HG, BLOCK_M)
        numbers = (
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            B, G, pairs_together(B * G, max(branches.L, 1), K + E, q.element_size()),
            HG, rows, branches.L, R, branches.C, int(branches.full), window, scale, softcap,
        )  # fmt: skip
        constants = {"K": K, "E": E, "BLOCK_K": padded(K), "BLOCK_E": padded(E), "PRECISION": dot_precision(), "CAREFUL": 0}
        return Launch(attention_forward, (tiles * B * G,), numbers, constants)

    tiles = key_tiles(k, v, config, known, "BLOCK_N", "BLOCK_EDGE")
    known.launch("forward", config, (q, k, v, *tiles, sinks, *layout, out, lse), prepare)
    return out, lse


@triton.jit(
    do_not_specialize=["B", "G", "together", "HG", "rows", "L", "R", "C", "full_own", "window"],
    do_not_specialize_on_alignment=["sinks", "lo", "table", "of_row", "tree", "path"],
)
def attention_forward(
    q, k, v, k_full, v_full, k_edge, v_edge, sinks, lo, table, of_row, tree, path, out, lse,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_km,
    stride_vb, stride_vg, stride_vm, stride_ob, stride_oh, stride_om,
    B, G, together, HG, rows, L, R, C, full_own, window, scale, softcap,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr,
    SLICES: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    pair, tile = taking_turns(B * G, together)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    tiles = tl.num_programs(0) // (B * G)
    flat, begin, end = tile_start(tile, tiles, L, R, HG, BLOCK_M)
    m, h, inside = tile_rows(flat, begin, end, HG, BLOCK_M)
    k += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
    lo += b * L
    table += b * C * 3
    of_row += b * R
    node = 0
    if tree is not None:
        tree += b * C * 4
        path += b * R * 2
    first, last, own_first, own_last, oldest, on = seen_by(m, inside, lo, table, of_row, tree, L, full_own, window)
    if tree is not None:
        node = first_node(m, on, of_row, L)

    skipped = L + R - rows  # packed rows before the first query row
    q += b * stride_qb + g * HG * stride_qh
    queries = load_tile(q, h.to(tl.int64) * stride_qh + (m - skipped).to(tl.int64) * stride_qm, inside, K, BLOCK_K)
    factor = scale * LOG2_E if softcap is None else LOG2_E
    if sinks is None:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        sink = tl.load(sinks + g * HG + h, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        top = tl.where(sink < LOWEST, LOWEST, sink)
        total = tl.exp2(sink - top)

    start, all_from, all_to, final = bounds(first, last, on)
    if window is not None:
        start, all_from = window_bounds(start, all_from, final, oldest, on, lo)
    before, full, edges = cover(start, all_from, all_to, final, BLOCK_N, BLOCK_EDGE)
    end_top, end_total, acc = over_keys(
        queries, top, total, first, last, own_first, own_last, oldest, on, k, v, k_full, v_full, k_edge, v_edge,
        lo, table, tree, path, node, b, g, stride_km, stride_vm, start, before, full, edges,
        L, L + R, window, scale, softcap, factor,
        K, E, BLOCK_K, BLOCK_E, BLOCK_N, BLOCK_EDGE, SLICES, PRECISION, CAREFUL, None,
    )  # fmt: skip
    # Because of 0 * NaN, a value that isn't finite also changes rows that don't see it. Then start over, and check all values.
    if not CAREFUL:  # noqa: SIM102, one condition is the compiler's, one the program's
        if tl.max((on & (tl.sum(acc * 0.0, 1) != 0.0)).to(tl.int32), 0) > 0:
            end_top, end_total, acc = over_keys(
                queries, top, total, first, last, own_first, own_last, oldest, on, k, v, k_full, v_full, k_edge, v_edge,
                lo, table, tree, path, node, b, g, stride_km, stride_vm, start, before, full, edges,
                L, L + R, window, scale, softcap, factor,
                K, E, BLOCK_K, BLOCK_E, BLOCK_N, BLOCK_EDGE, SLICES, PRECISION, True, 1,
            )  # fmt: skip

    zero = tl.minimum(L, 0)  # where the result goes is computed again: see tile_rows_again
    pair, tile = taking_turns(B * G + zero, together)
    flat, begin, end = tile_start(tile, tl.num_programs(0) // (B * G + zero), L, R + zero, HG, BLOCK_M)
    m, h, inside = tile_rows_again(zero, flat, begin, end, HG, BLOCK_M)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    row = m - skipped
    total = tl.where(on, end_total, 1.0)
    result = tl.where(on[:, None], acc * (1.0 / total)[:, None], 0.0)
    out += b * stride_ob + g * HG * stride_oh
    store_tile(out, h.to(tl.int64) * stride_oh + row.to(tl.int64) * stride_om, inside, result, E, BLOCK_E)
    natural = tl.where(on, end_top * LN_2 + tl.log(total), -float("inf"))
    tl.store(lse + (pair.to(tl.int64) * HG + h) * rows + row, natural, mask=inside)


@triton.jit
def over_keys(
    queries, top, total, first, last, own_first, own_last, oldest, on, k, v, k_full, v_full, k_edge, v_edge,
    lo, table, tree, path, node, b, g, stride_km, stride_vm, start, before, full, edges,
    L, M, window, scale, softcap, factor,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``top``, ``total`` and acc after all keys of the tile, which are copied in STAGES.

    With CAREFUL, values that aren't finite don't reach rows that don't see them.
    """
    acc = tl.zeros([queries.shape[0], BLOCK_E], tl.float32)
    if tree is None:
        top, total, acc = over_blocks(
            queries, top, total, acc, first, last, own_first, own_last, own_first, own_last, oldest, on,
            k, v, k_full, v_full, k_edge, v_edge, lo, path, b, g, stride_km, stride_vm,
            start, before, full, edges, L, M, window, scale, softcap, factor,
            K, E, BLOCK_K, BLOCK_E, BLOCK_N, BLOCK_EDGE, SLICES, PRECISION, CAREFUL, STAGES,
        )  # fmt: skip
    else:  # the text and the node of the tile's first row, then the nodes above
        near = node >= -1
        more = near
        while more:
            seen_first, seen_last, node = keys_of_node(node, near, own_first, own_last, table, tree, L)
            top, total, acc = over_blocks(
                queries, top, total, acc, first, last, own_first, own_last, seen_first, seen_last, oldest, on,
                k, v, k_full, v_full, k_edge, v_edge, lo, path, b, g, stride_km, stride_vm,
                start, before, full, edges, L, M, window, scale, softcap, factor,
                K, E, BLOCK_K, BLOCK_E, BLOCK_N, BLOCK_EDGE, SLICES, PRECISION, CAREFUL, STAGES,
            )  # fmt: skip
            before, full, edges, near = before * 0, full * 0, edges * 0, node < -1
            more = node >= 0
    if CAREFUL:  # what isn't finite now is from a value that the row sees: the whole row becomes NaN
        total += tl.sum(acc * 0.0, 1)
    return top, total, acc


@triton.jit
def over_blocks(
    queries, top, total, acc, first, last, own_first, own_last, seen_first, seen_last, oldest, on,
    k, v, k_full, v_full, k_edge, v_edge, lo, path, b, g, stride_km, stride_vm,
    start, before, full, edges, L, M, window, scale, softcap, factor,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same after own keys seen_first..seen_last and the text's blocks."""
    own_start, all_from, all_to, own_final = bounds(seen_first, seen_last, on)
    own_before, own_full, own_edges = cover(own_start, all_from, all_to, own_final, BLOCK_N, BLOCK_EDGE)
    i = tl.arange(0, BLOCK_EDGE)
    for j in tl.range(own_edges + edges, num_stages=STAGES):
        is_own = j < own_edges
        own_n0 = edge_block(j, own_start, own_before, own_full, BLOCK_N, BLOCK_EDGE)
        n0 = tl.where(is_own, own_n0, edge_block(j - own_edges, start, before, full, BLOCK_N, BLOCK_EDGE))
        n = n0 + i
        keys = load_rows(k_edge, k, b, g, n0, stride_km, M, BLOCK_EDGE, K, BLOCK_K)
        values = load_rows(v_edge, v, b, g, n0, stride_vm, M, BLOCK_EDGE, E, BLOCK_E)
        s = scores(queries, keys, scale, softcap, SLICES, PRECISION)
        begin = tl.where(is_own, seen_first, first)
        seen = in_range(n[None, :], begin[:, None], (tl.where(is_own, seen_last, last) - begin + 1)[:, None])
        if path is not None:
            seen &= on_path(n, own_first, own_last, path, L, M, window is not None)
        if window is not None:
            position = n - tl.load(lo + n, mask=n < L, other=0)
            seen &= is_own | (position[None, :] >= oldest[:, None])
        if CAREFUL:
            values, poison = without_poison(values)
            s += poison[None, :]
        s = tl.where(seen, s, -float("inf"))
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)

    own_start += own_before * BLOCK_EDGE
    start += before * BLOCK_EDGE - own_full * BLOCK_N
    for j in tl.range(own_full + full, num_stages=STAGES):
        n0 = tl.where(j < own_full, own_start, start) + j * BLOCK_N
        keys = load_rows(k_full, k, b, g, n0, stride_km, M, BLOCK_N, K, BLOCK_K)
        values = load_rows(v_full, v, b, g, n0, stride_vm, M, BLOCK_N, E, BLOCK_E)
        s = scores(queries, keys, scale, softcap, SLICES, PRECISION)
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return top, total, acc
