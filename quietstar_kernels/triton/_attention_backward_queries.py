"""Gradient of the queries: a program takes BLOCK_M query rows of one key head, as the forward does, and goes over their keys.

dS = p * (dO v^T - delta), dq = scale * dS k. Own rows first, then the text that all rows see, then the text at the edges.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._attention_backward_rows import Rows
from quietstar_kernels.triton._attention_gradient import finite, in_range, load_tile, store_tile, weights
from quietstar_kernels.triton._rows import OWN, own_chunks, text_blocks, tile_start
from quietstar_kernels.triton._target import dot_precision
from quietstar_kernels.triton.configs import ATTENTION_BACKWARD_QUERIES, pick


def query_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: Rows, layout: ThoughtLayout, scale: float, softcap: float | None
) -> Tensor:
    """dq, in the shape and dtype of q; NaN in rows that see NaN, 0 in rows that are off."""
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    dq = q.new_empty(q.shape)
    config = pick(ATTENTION_BACKWARD_QUERIES, q.element_size(), max(K, E))
    HG, block = H // G, config.blocks["BLOCK_M"]
    tiles = triton.cdiv(layout.R * HG, block) + triton.cdiv((rows - layout.R) * HG, block)
    attention_backward_queries[(tiles * B * G,)](
        grad_out, q, k, v, tables.delta, tables.lse, tables.first, tables.count, tables.own_first, tables.own_count, dq,
        *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dq.stride()[:3],
        B, G, HG, rows, layout.L, layout.M, layout.S, scale, softcap,
        K=K, E=E, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_E=max(16, triton.next_power_of_2(E)),
        PRECISION=dot_precision(), **config.options(),
    )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["B", "G", "HG", "rows", "L", "M", "S"])
def attention_backward_queries(
    grad_out, q, k, v, delta, lse, first_table, count_table, own_first_table, own_count_table, dq,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kg, stride_km, stride_vb, stride_vg, stride_vm, stride_db, stride_dh, stride_dm,
    B, G, HG, rows, L, M, S, scale, softcap,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) % (B * G)).to(tl.int64)
    b, g = pair // G, pair % G
    tile, tiles = tl.program_id(0) // (B * G), tl.num_programs(0) // (B * G)
    flat, begin, end = tile_start(tile, tiles, L, M - L, HG, BLOCK_M)
    f = flat + tl.arange(0, BLOCK_M)
    m, h = begin + f // HG, g * HG + f % HG
    inside = m < end
    row = (m - (M - rows)).to(tl.int64)
    k += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
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

    # Own rows first, as in the forward: a chunk of rows is a matrix of its own here.
    CHUNKS: tl.constexpr = BLOCK_M // OWN
    chunk_first, chunk_last, blocks = own_chunks(flat, L, M - L, S, HG, BLOCK_M)
    blocks *= tl.max((own_count > 0).to(tl.int32), 0)
    chunk_queries = tl.reshape(queries, [CHUNKS, OWN, BLOCK_K])
    chunk_grads = tl.reshape(grads, [CHUNKS, OWN, BLOCK_E])
    chunk_lse, chunk_delta = tl.reshape(row_lse, [CHUNKS, OWN, 1]), tl.reshape(row_delta, [CHUNKS, OWN, 1])
    chunk_own_first, chunk_own_count = tl.reshape(own_first, [CHUNKS, OWN, 1]), tl.reshape(own_count, [CHUNKS, OWN, 1])
    acc = tl.zeros([CHUNKS, OWN, BLOCK_K], tl.float32)
    for j in tl.range(blocks, num_stages=1):
        n = chunk_first[:, None] + (j * OWN + tl.arange(0, OWN))
        there = n <= chunk_last[:, None]
        keys = finite(load_tile(k, n.to(tl.int64) * stride_km, there, K, BLOCK_K))
        values = load_tile(v, n.to(tl.int64) * stride_vm, there, E, BLOCK_E)
        ds = score_gradient(
            chunk_queries, chunk_grads, tl.permute(keys, [0, 2, 1]), tl.permute(values, [0, 2, 1]),
            chunk_lse, chunk_delta, scale, softcap, PRECISION,
        )  # fmt: skip
        ds = tl.where(in_range(n[:, None, :], chunk_own_first, chunk_own_count), ds, 0.0)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    acc = tl.reshape(acc, [BLOCK_M, BLOCK_K])

    start, before, full, edges = text_blocks(first, first + count - 1, on, BLOCK_N, BLOCK_EDGE)
    full_start = start + before * BLOCK_EDGE
    i = tl.arange(0, BLOCK_N)
    for j in tl.range(full):
        n0 = full_start + j * BLOCK_N
        keys = load_tile(k + n0.to(tl.int64) * stride_km, i * stride_km, n0 + i < L, K, BLOCK_K)
        values = load_tile(v + n0.to(tl.int64) * stride_vm, i * stride_vm, n0 + i < L, E, BLOCK_E)
        ds = score_gradient(
            queries, grads, tl.trans(keys), tl.trans(values), row_lse[:, None], row_delta[:, None], scale, softcap, PRECISION
        )
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)

    i = tl.arange(0, BLOCK_EDGE)
    for j in tl.range(edges):
        n0 = start + j * BLOCK_EDGE + tl.where(j < before, 0, full * BLOCK_N)
        n = n0 + i
        keys = finite(load_tile(k + n0.to(tl.int64) * stride_km, i * stride_km, n < L, K, BLOCK_K))
        values = load_tile(v + n0.to(tl.int64) * stride_vm, i * stride_vm, n < L, E, BLOCK_E)
        ds = score_gradient(
            queries, grads, tl.trans(keys), tl.trans(values), row_lse[:, None], row_delta[:, None], scale, softcap, PRECISION
        )
        ds = tl.where(in_range(n[None, :], first[:, None], count[:, None]), ds, 0.0)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)

    acc = tl.where(adds[:, None], acc * scale, tl.where(on, float("nan"), 0.0)[:, None])
    store_tile(dq + b * stride_db, h * stride_dh + row * stride_dm, inside, acc, K, BLOCK_K)


@triton.jit
def score_gradient(queries, grads, keys, values, lse, delta, scale, softcap, PRECISION: tl.constexpr):
    """d loss / d (scale * q·k) of rows against keys [..,K,columns] and values [..,E,columns]."""
    p, slope = weights(tl.dot(queries, keys, input_precision=PRECISION), lse, scale, softcap)
    return p * (tl.dot(grads, values, input_precision=PRECISION) - delta) * slope
