"""Backward of thought_attention, without atomics: each gradient is summed by one program, in a fixed order.

First tables of the query rows, then dq, then dk and dv (``backward_keys``). The last two both compute the scores again, which
makes seven matrix products. A single pass for all three takes five, but has to add up dq across programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._options import AttentionOptions
from ...branches import Branches
from .._device import (
    LOG2_E,
    bounds,
    cover,
    edge_block,
    first_node,
    in_range,
    keys_of_node,
    load_tile,
    on_path,
    scores,
    seen_by,
    store_tile,
    taking_turns,
    tile_rows,
    tile_rows_again,
    tile_start,
    weights,
    window_bounds,
)
from .._launch import Launch, Plan, cdiv, padded, pairs_together
from ..configs import (
    ATTENTION_BACKWARD_QUERIES,
    ATTENTION_BACKWARD_QUERIES_TREE,
    ATTENTION_BACKWARD_ROWS,
    dot_precision,
    pick,
)

# From 2^28 on, rounding alone moves a score so far that exp(score - lse) may overflow. Such a row has all its weight on one
# key, and its scores no gradient.
SATURATED = tl.constexpr(1 << 28)
TAIL = 64  # rows of the largest tile that reads the tables


@dataclass
class Rows:
    """Tables of the query rows for the next kernels. They are flat, with TAIL more numbers at the end that may be read.

    Attributes:
        delta: fp32 [B,H,rows], rowsum(dO * O) - dlse.
        lse: fp32 [B,H,rows], in units of log 2; inf for a row that adds nothing, as it is off, is saturated, or has a NaN as
            its result. The delta of such a row is its dq: NaN in the last case, else 0.
        first, count: int32 [B,rows], the text that the row sees: ``count`` positions from ``first``.
        own_first, own_count: int32 [B,rows], the packed rows of its own branch that it sees. In a tree own_first is a row of
            the path: see ``seen_by``. Both counts are 0 in a row that is off, and only there.
        oldest: int32 [B,rows], the smallest position id that the row sees; None without a window.
        dsinks: fp32 [B,H,blocks], still to be summed; None without sinks.
    """

    delta: Tensor
    lse: Tensor
    first: Tensor
    count: Tensor
    own_first: Tensor
    own_count: Tensor
    oldest: Tensor | None
    dsinks: Tensor | None


class Inputs(NamedTuple):
    """What the kernels of the gradients read."""

    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    branches: Branches
    options: AttentionOptions
    tables: Rows
    plan: Plan


def row_tables(
    grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    branches: Branches, window: int | None, sinks: Tensor | None, known: Plan,
) -> Rows:  # fmt: skip
    """Tables of the rows of grad_out and out [B,H,rows,E], lse and grad_lse [B,H,rows]: all M rows, or the last R."""
    B, H, rows, E = out.shape
    config = ATTENTION_BACKWARD_ROWS
    blocks = cdiv(rows, config.blocks["BLOCK_M"])
    delta, shift = (out.new_empty(B * H * rows + TAIL, dtype=torch.float32) for _ in range(2))
    first, count, own_first, own_count = (out.new_empty(B * rows + TAIL, dtype=torch.int32) for _ in range(4))
    oldest = None if window is None else torch.empty_like(first)
    dsinks = None if sinks is None else out.new_empty((B, H, blocks), dtype=torch.float32)
    layout = branches.contiguous()

    def prepare() -> Launch:
        sizes = H, rows, branches.L, branches.R, branches.C, int(branches.full), window
        numbers = *grad_out.stride()[:3], *out.stride()[:3], *sizes
        return Launch(attention_rows, (blocks * B * H,), numbers, {"E": E, "BLOCK_E": padded(E)})

    tables = delta, shift, first, count, own_first, own_count, oldest, dsinks
    known.launch("rows", config, (grad_out, out, lse.contiguous(), grad_lse, sinks, *layout, *tables), prepare)
    return Rows(*tables)


@triton.jit(
    do_not_specialize=["H", "rows", "L", "R", "C", "full_own", "window"],
    do_not_specialize_on_alignment=["sinks", "lo", "table", "of_row", "tree", "path"],
)
def attention_rows(
    grad_out, out, lse, grad_lse, sinks, lo, table, of_row, tree, path,
    delta, shift, first_table, count_table, own_first_table, own_count_table, oldest_table, dsinks,
    stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om,
    H, rows, L, R, C, full_own, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    m = row + (L + R - rows)
    if tree is not None:
        tree += b * C * 4
    layout = lo + b * L, table + b * C * 3, of_row + b * R, tree
    first, last, own_first, own_last, oldest, on = seen_by(m, inside, *layout, L, full_own, window)

    at = head * rows + row
    natural = tl.load(lse + at, mask=on, other=float("inf"))
    grad = load_tile(grad_out + b * stride_gb + h * stride_gh, row.to(tl.int64) * stride_gm, on, E, BLOCK_E)
    result = load_tile(out + b * stride_ob + h * stride_oh, row.to(tl.int64) * stride_om, on, E, BLOCK_E)
    result = result.to(tl.float32)
    poison = tl.sum(result * 0.0, 1)
    log2_sum = natural * LOG2_E + poison
    adds = on & (tl.abs(log2_sum) < SATURATED)
    d = tl.sum(grad.to(tl.float32) * result, 1)
    if grad_lse is not None:
        d -= tl.load(grad_lse + at, mask=on, other=0.0)
    d = tl.where(adds, d, tl.where(log2_sum == log2_sum, 0.0, log2_sum))
    log2_sum = tl.where(adds, log2_sum, float("inf"))
    tl.store(delta + at, d, mask=inside)
    tl.store(shift + at, log2_sum, mask=inside)
    if dsinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        tl.store(dsinks + head * blocks + block, -tl.sum(tl.where(adds, tl.exp2(sink - log2_sum) * d, 0.0), 0))
    if h == 0:
        at = b * rows + row
        tl.store(first_table + at, first, mask=inside)
        tl.store(count_table + at, tl.where(on, last - first + 1, 0), mask=inside)
        tl.store(own_first_table + at, own_first, mask=inside)
        tl.store(own_count_table + at, tl.where(on, own_last - own_first + 1, 0), mask=inside)
        if window is not None:
            tl.store(oldest_table + at, oldest, mask=inside)


def query_gradient(inputs: Inputs) -> Tensor:
    """dq, with the shape and dtype of q; NaN in rows that see NaN, 0 in rows that are off.

    As in the forward, a program takes BLOCK_M query rows of one key head and loops over their keys: first those at the edges,
    then those that all rows see, of own rows and text. dS = p * (dO v^T - delta), dq = scale * dS k.
    """
    grad_out, q, k, v, branches, (scale, _, softcap, _), tables, known = inputs
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    dq = q.new_empty(q.shape)
    tables_of = [ATTENTION_BACKWARD_QUERIES_TREE] * (branches.tree is not None) + [ATTENTION_BACKWARD_QUERIES]
    config = pick(tables_of, q.element_size(), max(K, E))

    def prepare() -> Launch:
        HG, BLOCK_M, L, M = H // G, config.blocks["BLOCK_M"], branches.L, branches.M
        tiles = cdiv((M - L) * HG, BLOCK_M) + cdiv((rows - (M - L)) * HG, BLOCK_M)
        strides = *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
        together = pairs_together(B * G, max(L, 1), K + E, q.element_size())
        numbers = *strides, B, G, together, HG, rows, L, M, branches.C, scale, softcap
        constants = {"K": K, "E": E, "BLOCK_K": padded(K), "BLOCK_E": padded(E), "PRECISION": dot_precision()}
        return Launch(attention_backward_queries, (tiles * B * G,), numbers, constants)

    seen = tables.first, tables.count, tables.own_first, tables.own_count, tables.oldest
    tensors = grad_out, q, k, v, tables.delta, tables.lse, *seen, *branches.contiguous(), dq
    known.launch("queries", config, tensors, prepare)
    return dq


@triton.jit(
    do_not_specialize=["B", "G", "together", "HG", "rows", "L", "M", "C"],
    do_not_specialize_on_alignment=["lo", "table", "of_row", "tree", "path"],
)
def attention_backward_queries(
    grad_out, q, k, v,
    delta, lse, first_table, count_table, own_first_table, own_count_table, oldest_table, lo, table, of_row, tree, path, dq,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kg, stride_km, stride_vb, stride_vg, stride_vm,
    B, G, together, HG, rows, L, M, C, scale, softcap,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair, tile = taking_turns(B * G, together)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    tiles = tl.num_programs(0) // (B * G)
    flat, begin, end = tile_start(tile, tiles, L, M - L, HG, BLOCK_M)
    m, h, inside = tile_rows(flat, begin, end, HG, BLOCK_M)
    h = g * HG + h
    row = (m - (M - rows)).to(tl.int64)
    k += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
    lo += b * L
    at = (b * (G * HG) + h) * rows + row
    row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + at, mask=inside, other=0.0)
    at = b * rows + row
    first = tl.load(first_table + at, mask=inside, other=0)
    count = tl.load(count_table + at, mask=inside, other=0)
    own_first = tl.load(own_first_table + at, mask=inside, other=0)
    own_count = tl.load(own_count_table + at, mask=inside, other=0)
    on = count + own_count > 0
    adds = row_lse < float("inf")
    queries = load_tile(q + b * stride_qb, h * stride_qh + row * stride_qm, adds, K, BLOCK_K)
    grads = load_tile(grad_out + b * stride_gb, h * stride_gh + row * stride_gm, adds, E, BLOCK_E)

    start, all_from, all_to, final = bounds(first, first + count - 1, on)
    oldest = None
    if oldest_table is not None:
        oldest = tl.load(oldest_table + at, mask=inside, other=0)
        start, all_from = window_bounds(start, all_from, final, oldest, on, lo)
    before, full, edges = cover(start, all_from, all_to, final, BLOCK_N, BLOCK_EDGE)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if tree is None:
        acc = over_blocks(
            acc, queries, grads, row_lse, row_delta, first, count, own_first, own_first, own_first, own_count, oldest, on,
            k, v, lo, path, stride_km, stride_vm, start, before, full, edges, L, M, scale, softcap,
            K, E, BLOCK_K, BLOCK_E, BLOCK_N, BLOCK_EDGE, SLICES, PRECISION,
        )  # fmt: skip
    else:  # the text and the node of the tile's first row, then the nodes above
        table += b * C * 3
        of_row += b * (M - L)
        tree += b * C * 4
        path += b * (M - L) * 2
        own_last = own_first + own_count - 1
        node = first_node(m, on, of_row, L)
        near = node >= -1
        more = near
        while more:
            seen_first, seen_last, node = keys_of_node(node, near, own_first, own_last, table, tree, L)
            acc = over_blocks(
                acc, queries, grads, row_lse, row_delta, first, count, own_first, own_last,
                seen_first, seen_last - seen_first + 1, oldest, on,
                k, v, lo, path, stride_km, stride_vm, start, before, full, edges, L, M, scale, softcap,
                K, E, BLOCK_K, BLOCK_E, BLOCK_N, BLOCK_EDGE, SLICES, PRECISION,
            )  # fmt: skip
            before, full, edges, near = before * 0, full * 0, edges * 0, node < -1
            more = node >= 0

    acc = tl.where(adds[:, None], acc * scale, row_delta[:, None])
    m, h, inside = tile_rows_again(tl.minimum(L, 0), flat, begin, end, HG, BLOCK_M)
    row = (m - (M - rows)).to(tl.int64)
    at = ((b * G + g) * HG + h) * rows + row  # in dq [B,H,rows,K], contiguous
    store_tile(dq, at * K, inside, acc, K, BLOCK_K)


@triton.jit
def over_blocks(
    acc, queries, grads, row_lse, row_delta, first, count, own_first, own_last, seen_first, seen_count, oldest, on,
    k, v, lo, path, stride_km, stride_vm, start, before, full, edges, L, M, scale, softcap,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc after ``seen_count`` own keys from ``seen_first`` and the text's blocks."""
    own_start, all_from, all_to, final = bounds(seen_first, seen_first + seen_count - 1, on)
    own_before, own_full, own_edges = cover(own_start, all_from, all_to, final, BLOCK_N, BLOCK_EDGE)
    i = tl.arange(0, BLOCK_EDGE)
    for j in tl.range(own_edges + edges):
        is_own = j < own_edges
        own_n0 = edge_block(j, own_start, own_before, own_full, BLOCK_N, BLOCK_EDGE)
        n0 = tl.where(is_own, own_n0, edge_block(j - own_edges, start, before, full, BLOCK_N, BLOCK_EDGE))
        n = n0 + i
        keys = load_tile(k + n0.to(tl.int64) * stride_km, i * stride_km, n < M, K, BLOCK_K)
        values = load_tile(v + n0.to(tl.int64) * stride_vm, i * stride_vm, n < M, E, BLOCK_E)
        # 0 * NaN must not reach rows that don't see the NaN. Rows that do have no finite log-sum-exp, and are set below.
        keys = tl.where(keys.to(tl.float32) * 0.0 == 0.0, keys, 0.0)
        ds = score_gradient(queries, grads, keys, values, row_lse, row_delta, scale, softcap, SLICES, PRECISION)
        begin = tl.where(is_own, seen_first, first)
        seen = in_range(n[None, :], begin[:, None], tl.where(is_own, seen_count, count)[:, None])
        if path is not None:
            seen &= on_path(n, own_first, own_last, path, L, M, oldest is not None)
        if oldest is not None:
            position = n - tl.load(lo + n, mask=n < L, other=0)
            seen = seen & (is_own | (position[None, :] >= oldest[:, None]))
        acc = tl.dot(tl.where(seen, ds, 0.0).to(keys.dtype), keys, acc, input_precision=PRECISION)

    i = tl.arange(0, BLOCK_N)
    own_start += own_before * BLOCK_EDGE
    start += before * BLOCK_EDGE - own_full * BLOCK_N
    for j in tl.range(own_full + full):
        n0 = tl.where(j < own_full, own_start, start) + j * BLOCK_N
        keys = load_tile(k + n0.to(tl.int64) * stride_km, i * stride_km, n0 + i < M, K, BLOCK_K)
        values = load_tile(v + n0.to(tl.int64) * stride_vm, i * stride_vm, n0 + i < M, E, BLOCK_E)
        ds = score_gradient(queries, grads, keys, values, row_lse, row_delta, scale, softcap, SLICES, PRECISION)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit
def score_gradient(
    queries, grads, keys, values, lse, delta, scale, softcap, SLICES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """d loss / d (scale * q·k), [rows,keys]."""
    p, slope = weights(scores(queries, keys, scale, None, SLICES, PRECISION), lse[:, None], scale, softcap, keys.dtype)
    dp = scores(grads, values, scale, None, SLICES, PRECISION)
    return p * (dp - delta[:, None]) * slope
