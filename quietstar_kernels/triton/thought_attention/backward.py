"""Backward of thought_attention, without atomics: each gradient is summed by one program, in a fixed order.

First tables of the query rows, then dq, then dk and dv (``backward_keys``). The last two both compute the scores again, which
makes seven matrix products. A single pass for all three takes five, but has to add up dq across programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._options import AttentionOptions
from ...branches import Branches
from .._device import (
    LOG2_E,
    Blocks,
    Keys,
    Layout,
    Seen,
    Sizes,
    Stride,
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
from .._launch import Launch, Plan, cdiv, padded, pairs_together, tile_of
from ..configs import ATTENTION_BACKWARD_QUERIES, ATTENTION_BACKWARD_QUERIES_TREE, ATTENTION_BACKWARD_ROWS, Config, pick

# From 2^28 on, rounding alone moves a score so far that exp(score - lse) may overflow. Such a row has all its weight on one
# key, and its scores no gradient.
SATURATED = tl.constexpr(1 << 28)
TAIL = 64  # rows of the largest tile that reads the tables


class Rows(NamedTuple):
    """Tables of the query rows for the next kernels. They are flat, with TAIL more numbers at the end that may be read.

    Attributes:
        delta: fp32 [B,H,rows], rowsum(dO * O) - dlse.
        lse: fp32 [B,H,rows], in units of log 2; inf for a row that adds nothing, as it is off, is saturated, or has a NaN as
            its result. The delta of such a row is its dq: NaN in the last case, else 0.
        first, text_count: int32 [B,rows], the text that the row sees: ``text_count`` positions from ``first``.
        own_first, own_count: int32 [B,rows], the packed rows of its own branch that it sees. In a tree own_first is a row of
            the path: see ``seen_by``. Both counts are 0 in a row that is off, and only there.
        oldest: int32 [B,rows], the smallest position id that the row sees; None without a window.
        dsinks: fp32 [B,H,blocks], still to be summed; None without sinks.
    """

    delta: Tensor
    lse: Tensor
    first: Tensor
    text_count: Tensor
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
    layout: list[Tensor | None]  # ``branches.contiguous()``
    options: AttentionOptions
    tables: Rows
    plan: Plan
    in_gluon: bool = False


def row_tables(
    grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    branches: Branches, layout: list[Tensor | None], window: int | None, sinks: Tensor | None, known: Plan,
) -> Rows:  # fmt: skip
    """Tables of the rows of grad_out and out [B,H,rows,E], lse and grad_lse [B,H,rows]: all M rows, or the last R."""
    B, H, rows, E = out.shape
    config = ATTENTION_BACKWARD_ROWS
    blocks = cdiv(rows, config.blocks["BLOCK_M"])
    delta, shift = (out.new_empty(B * H * rows + TAIL, dtype=torch.float32) for _ in range(2))
    first, count, own_first, own_count = (out.new_empty(B * rows + TAIL, dtype=torch.int32) for _ in range(4))
    oldest = None if window is None else torch.empty_like(first)
    dsinks = None if sinks is None else out.new_empty((B, H, blocks), dtype=torch.float32)

    def prepare() -> Launch:
        strides = Stride(*grad_out.stride()[:3]), Stride(*out.stride()[:3])
        numbers = *strides, H, rows, branches.L, branches.R, branches.C, int(branches.full), window
        return Launch(attention_rows, (blocks * B * H,), numbers, {"E": E, "BLOCK_E": padded(E)})

    tables = Rows(delta, shift, first, count, own_first, own_count, oldest, dsinks)
    known.launch("rows", config, (grad_out, out, lse.contiguous(), grad_lse, sinks, *layout, tables), prepare)
    return tables


@triton.jit(
    do_not_specialize=["H", "rows", "L", "R", "C", "full_own", "window"],
    do_not_specialize_on_alignment=["sinks", "lo", "table", "of_row", "tree", "path"],
)
def attention_rows(
    grad_out, out, lse, grad_lse, sinks, lo, table, of_row, tree, path, tables, stride_g, stride_o,
    H, rows, L, R, C, full_own, window, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
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
        path += b * R * 2
    layout = Layout(lo + b * L, table + b * C * 3, of_row + b * R, tree, path)
    seen = seen_by(m, inside, layout, L, full_own, window)
    on = seen.on

    at = head * rows + row
    natural = tl.load(lse + at, mask=on, other=float("inf"))
    offsets = row.to(tl.int64)
    grad = load_tile(grad_out + b * stride_g.b + h * stride_g.h, offsets * stride_g.m, on, E, BLOCK_E)  # [BLOCK_M, BLOCK_E]
    result = load_tile(out + b * stride_o.b + h * stride_o.h, offsets * stride_o.m, on, E, BLOCK_E)  # [BLOCK_M, BLOCK_E]
    result = result.to(tl.float32)
    poison = tl.sum(result * 0.0, 1)
    log2_sum = natural * LOG2_E + poison
    adds = on & (tl.abs(log2_sum) < SATURATED)
    d = tl.sum(grad.to(tl.float32) * result, 1)
    if grad_lse is not None:
        d -= tl.load(grad_lse + at, mask=on, other=0.0)
    d = tl.where(adds, d, tl.where(log2_sum == log2_sum, 0.0, log2_sum))
    log2_sum = tl.where(adds, log2_sum, float("inf"))
    tl.store(tables.delta + at, d, mask=inside)
    tl.store(tables.lse + at, log2_sum, mask=inside)
    if tables.dsinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        tl.store(tables.dsinks + head * blocks + block, -tl.sum(tl.where(adds, tl.exp2(sink - log2_sum) * d, 0.0), 0))
    if h == 0:
        at = b * rows + row
        tl.store(tables.first + at, seen.first, mask=inside)
        tl.store(tables.text_count + at, tl.where(on, seen.last - seen.first + 1, 0), mask=inside)
        tl.store(tables.own_first + at, seen.own_first, mask=inside)
        tl.store(tables.own_count + at, tl.where(on, seen.own_last - seen.own_first + 1, 0), mask=inside)
        if window is not None:
            tl.store(tables.oldest + at, seen.oldest, mask=inside)


def query_gradient(inputs: Inputs) -> Tensor:
    """dq, with the shape and dtype of q; NaN in rows that see NaN, 0 in rows that are off.

    As in the forward, a program takes BLOCK_M query rows of one key head and loops over their keys: first those at the edges,
    then those that all rows see, of own rows and text. dS = p * (dO v^T - delta), dq = scale * dS k.
    """
    grad_out, q, k, v, branches, layout, (scale, _, softcap, _), tables, known, _ = inputs
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    dq = q.new_empty(q.shape)

    def choose() -> Config:
        first = [ATTENTION_BACKWARD_QUERIES_TREE] * (branches.tree is not None)
        return pick([*first, ATTENTION_BACKWARD_QUERIES], q.element_size(), max(K, E))

    config = known.once("queries", choose)

    def prepare() -> Launch:
        HG, BLOCK_M, L, M = H // G, config.blocks["BLOCK_M"], branches.L, branches.M
        tiles = cdiv((M - L) * HG, BLOCK_M) + cdiv((rows - (M - L)) * HG, BLOCK_M)
        strides = tuple(Stride(*x.stride()[:3]) for x in (grad_out, q, k, v))
        together = pairs_together(B * G, L, K + E, q.element_size())
        numbers = strides, B, G, together, HG, rows, L, M, branches.C, scale, softcap
        return Launch(attention_backward_queries, (tiles * B * G,), numbers, {"tile": tile_of(config, K, E)})

    tensors = grad_out, q, k, v, tables, *layout, dq
    known.launch("queries", config, tensors, prepare)
    return dq


@triton.jit(
    do_not_specialize=["B", "G", "together", "HG", "rows", "L", "M", "C"],
    do_not_specialize_on_alignment=["lo", "table", "of_row", "tree", "path"],
)
def attention_backward_queries(
    grad_out, q, k, v, tables, lo, table, of_row, tree, path, dq, strides,
    B, G, together, HG, rows, L, M, C, scale, softcap, tile,
):  # fmt: skip
    stride_g, stride_q, stride_k, stride_v = strides
    window = None if tables.oldest is None else 1  # its width is in the table
    sizes = Sizes(L, M, window, scale, softcap)
    pair, index = taking_turns(B * G, together)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    tiles = tl.num_programs(0) // (B * G)
    flat, begin, end = tile_start(index, tiles, L, M - L, HG, tile.BLOCK_M)
    m, h, inside = tile_rows(flat, begin, end, HG, tile.BLOCK_M)
    h = g * HG + h
    row = (m - (M - rows)).to(tl.int64)
    k += b * stride_k.b + g * stride_k.h
    v += b * stride_v.b + g * stride_v.h
    keys = Keys(k, v, stride_k.m, stride_v.m)
    lo += b * L
    at = (b * (G * HG) + h) * rows + row
    lse = tl.load(tables.lse + at, mask=inside, other=float("inf"))
    delta = tl.load(tables.delta + at, mask=inside, other=0.0)
    at = b * rows + row
    first = tl.load(tables.first + at, mask=inside, other=0)
    count = tl.load(tables.text_count + at, mask=inside, other=0)
    own_first = tl.load(tables.own_first + at, mask=inside, other=0)
    own_count = tl.load(tables.own_count + at, mask=inside, other=0)
    on = count + own_count > 0
    adds = lse < float("inf")
    queries = load_tile(q + b * stride_q.b, h * stride_q.h + row * stride_q.m, adds, tile.K, tile.BLOCK_K)
    grads = load_tile(grad_out + b * stride_g.b, h * stride_g.h + row * stride_g.m, adds, tile.E, tile.BLOCK_E)

    limits = bounds(first, first + count - 1, on)
    oldest = own_first
    if tables.oldest is not None:
        oldest = tl.load(tables.oldest + at, mask=inside, other=0)
        limits = window_bounds(limits, oldest, on, lo, tl.arange(0, 1024))
    text = cover(limits, tile)
    start, before, full, edges = text
    acc = tl.zeros([tile.BLOCK_M, tile.BLOCK_K], tl.float32)
    # Made here: earlier, these pointers take registers from the loads above.
    table += b * C * 3
    of_row += b * (M - L)
    if tree is not None:
        tree += b * C * 4
        path += b * (M - L) * 2
    layout = Layout(lo, table, of_row, tree, path)
    seen = Seen(first, first + count - 1, own_first, own_first + own_count - 1, oldest, on)
    if tree is None:
        acc = over_blocks(acc, queries, grads, lse, delta, seen, count, own_first, own_count, keys, layout, text, sizes, tile)
    else:  # the text and the node of the tile's first row, then the nodes above
        node = first_node(m, on, layout.of_row, L)
        near = node >= -1
        more = near
        while more:
            seen_first, seen_last, node = keys_of_node(node, near, seen, layout, L)
            seen_count = seen_last - seen_first + 1
            text = Blocks(start, before, full, edges)
            acc = over_blocks(
                acc, queries, grads, lse, delta, seen, count, seen_first, seen_count, keys, layout, text, sizes, tile
            )
            before, full, edges, near = before * 0, full * 0, edges * 0, node < -1
            more = node >= 0

    acc = tl.where(adds[:, None], acc * scale, delta[:, None])
    m, h, inside = tile_rows_again(tl.minimum(L, 0), flat, begin, end, HG, tile.BLOCK_M)
    row = (m - (M - rows)).to(tl.int64)
    at = ((b * G + g) * HG + h) * rows + row  # in dq [B,H,rows,K], contiguous
    store_tile(dq, at * tile.K, inside, acc, tile.K, tile.BLOCK_K)


@triton.jit
def over_blocks(acc, queries, grads, lse, delta, seen, count, own_first, own_count, keys, layout, text, sizes, tile):
    """acc [BLOCK_M, BLOCK_K] after ``own_count`` own keys from ``own_first`` and ``count`` of the text's."""
    own = cover(bounds(own_first, own_first + own_count - 1, seen.on), tile)
    i = tl.arange(0, tile.BLOCK_EDGE)
    for j in tl.range(own.edges + text.edges):
        is_own = j < own.edges
        own_n0 = edge_block(j, own, tile)
        n0 = tl.where(is_own, own_n0, edge_block(j - own.edges, text, tile))
        n = n0 + i
        at, inside = n0.to(tl.int64), n < sizes.M
        k = load_tile(keys.k + at * keys.stride_k, i * keys.stride_k, inside, tile.K, tile.BLOCK_K)  # [BLOCK_EDGE, BLOCK_K]
        v = load_tile(keys.v + at * keys.stride_v, i * keys.stride_v, inside, tile.E, tile.BLOCK_E)  # [BLOCK_EDGE, BLOCK_E]
        # 0 * NaN must not reach rows that don't see the NaN. Rows that do have no finite log-sum-exp, and are set below.
        k = tl.where(k.to(tl.float32) * 0.0 == 0.0, k, 0.0)
        ds = score_gradient(queries, grads, k, v, lse, delta, sizes, tile)
        begin = tl.where(is_own, own_first, seen.first)
        sees = in_range(n[None, :], begin[:, None], tl.where(is_own, own_count, count)[:, None])
        if layout.path is not None:
            sees &= on_path(n, seen, layout.path, sizes)
        if sizes.window is not None:
            position = n - tl.load(layout.lo + n, mask=n < sizes.L, other=0)
            sees = sees & (is_own | (position[None, :] >= seen.oldest[:, None]))
        acc = tl.dot(tl.where(sees, ds, 0.0).to(k.dtype), k, acc, input_precision=tile.PRECISION)

    i = tl.arange(0, tile.BLOCK_N)
    own_start = own.start + own.before * tile.BLOCK_EDGE
    start = text.start + (text.before * tile.BLOCK_EDGE - own.full * tile.BLOCK_N)
    for j in tl.range(own.full + text.full):
        n0 = tl.where(j < own.full, own_start, start) + j * tile.BLOCK_N
        at, inside = n0.to(tl.int64), n0 + i < sizes.M
        k = load_tile(keys.k + at * keys.stride_k, i * keys.stride_k, inside, tile.K, tile.BLOCK_K)  # [BLOCK_N, BLOCK_K]
        v = load_tile(keys.v + at * keys.stride_v, i * keys.stride_v, inside, tile.E, tile.BLOCK_E)  # [BLOCK_N, BLOCK_E]
        ds = score_gradient(queries, grads, k, v, lse, delta, sizes, tile)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=tile.PRECISION)
    return acc


@triton.jit
def score_gradient(queries, grads, k, v, lse, delta, sizes, tile):
    """d loss / d (scale * q·k), [rows,keys]."""
    qk = scores(queries, k, sizes.scale, None, tile.SLICES, tile.PRECISION)
    p, slope = weights(qk, lse[:, None], sizes.scale, sizes.softcap, k.dtype)
    dp = scores(grads, v, sizes.scale, None, tile.SLICES, tile.PRECISION)
    return p * (dp - delta[:, None]) * slope
