"""Gradient of the queries: as in the forward, a program takes BLOCK_M query rows of one key head and loops over their keys.

dS = p * (dO v^T - delta), dq = scale * dS k. First the keys at the edges, then those that all rows see, of own rows and text.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.triton._launch import Launch, cdiv
from quietstar_kernels.triton._rows import bounds, cover, edge_block, tile_rows, tile_start, window_bounds
from quietstar_kernels.triton._softmax import scores
from quietstar_kernels.triton._target import dot_precision
from quietstar_kernels.triton._tiles import in_range, load_tile, padded, store_tile
from quietstar_kernels.triton.configs import ATTENTION_BACKWARD_QUERIES, pick
from quietstar_kernels.triton.thought_attention.backward_rows import Inputs
from quietstar_kernels.triton.thought_attention.backward_weights import weights


def query_gradient(inputs: Inputs) -> Tensor:
    """dq, with the shape and dtype of q; NaN in rows that see NaN, 0 in rows that are off."""
    grad_out, q, k, v, branches, (scale, _, softcap, _), tables, known = inputs
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    dq = q.new_empty(q.shape)
    config = pick(ATTENTION_BACKWARD_QUERIES, q.element_size(), max(K, E))

    def prepare() -> Launch:
        HG, BLOCK_M, L, M = H // G, config.blocks["BLOCK_M"], branches.L, branches.M
        tiles = cdiv((M - L) * HG, BLOCK_M) + cdiv((rows - (M - L)) * HG, BLOCK_M)
        strides = *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
        numbers = *strides, B, G, HG, rows, L, M, scale, softcap
        constants = {"K": K, "E": E, "BLOCK_K": padded(K), "BLOCK_E": padded(E), "PRECISION": dot_precision()}
        return Launch(attention_backward_queries, (tiles * B * G,), numbers, constants)

    seen = tables.first, tables.count, tables.own_first, tables.own_count, tables.oldest
    tensors = grad_out, q, k, v, tables.delta, tables.lse, *seen, branches.lo.contiguous(), dq
    known.launch("queries", config, tensors, prepare)
    return dq


@triton.jit(do_not_specialize=["B", "G", "HG", "rows", "L", "M"], do_not_specialize_on_alignment=["lo"])
def attention_backward_queries(
    grad_out, q, k, v,
    delta, lse, first_table, count_table, own_first_table, own_count_table, oldest_table, lo, dq,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kg, stride_km, stride_vb, stride_vg, stride_vm,
    B, G, HG, rows, L, M, scale, softcap,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) % (B * G)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    tile, tiles = tl.program_id(0) // (B * G), tl.num_programs(0) // (B * G)
    flat, begin, behind = tile_start(tile, tiles, L, M - L, HG, BLOCK_M)
    m, h, inside = tile_rows(flat, begin, behind, HG, BLOCK_M)
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

    start, all_from, all_to, end = bounds(first, first + count - 1, on)
    if oldest_table is not None:
        oldest = tl.load(oldest_table + at, mask=inside, other=0)
        start, all_from = window_bounds(start, all_from, end, oldest, on, lo, 1024)
    before, full, edges = cover(start, all_from, all_to, end, BLOCK_N, BLOCK_EDGE)
    own_start, all_from, all_to, end = bounds(own_first, own_first + own_count - 1, on)
    own_before, own_full, own_edges = cover(own_start, all_from, all_to, end, BLOCK_N, BLOCK_EDGE)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
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
        seen = in_range(n[None, :], tl.where(is_own, own_first, first)[:, None], tl.where(is_own, own_count, count)[:, None])
        if oldest_table is not None:
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

    acc = tl.where(adds[:, None], acc * scale, row_delta[:, None])
    # Computed again, with another kind of division: else the compiler keeps the rows and heads from above in registers.
    f = (flat + tl.arange(0, BLOCK_M)).to(tl.uint32)
    row, h = (f // HG.to(tl.uint32)).to(tl.int64), (f % HG.to(tl.uint32)).to(tl.int64)
    row += begin - (M - rows)
    at = ((b * G + g) * HG + h) * rows + row  # in dq [B,H,rows,K], contiguous
    store_tile(dq, at * K, row < behind - (M - rows), acc, K, BLOCK_K)


@triton.jit
def score_gradient(
    queries, grads, keys, values, lse, delta, scale, softcap, SLICES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """d loss / d (scale * q·k), [rows,keys]."""
    p, slope = weights(scores(queries, keys, scale, None, SLICES, PRECISION), lse[:, None], scale, softcap, keys.dtype)
    dp = scores(grads, values, scale, None, SLICES, PRECISION)
    return p * (dp - delta[:, None]) * slope
