"""Forward of thought_attention: a program takes BLOCK_M query rows of one key head and goes over their keys block by block.

The H/G query heads of a key head are folded into the rows: flat row f is row f // HG under head f % HG. Text rows and
thought rows have tiles of their own. The keys of a tile, in this order:

1. own rows, by 3D products: each chunk of 16 flat rows against blocks of 16 keys from the start of its first thought on;
2. text that all rows see, in blocks of BLOCK_N without a mask;
3. text at the edges, which some rows see, in masked blocks of BLOCK_EDGE.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._math import LN_2, LOG2_E, tanh
from quietstar_kernels.triton._rows import (
    FAR,
    OWN,
    cover,
    own_chunks,
    seen_by,
    text_bounds,
    tile_rows,
    tile_start,
    window_bounds,
)
from quietstar_kernels.triton._target import dot_precision
from quietstar_kernels.triton._tiles import in_range, load_tile, store_tile
from quietstar_kernels.triton.configs import ATTENTION_FORWARD, pick

LOWEST = tl.constexpr(-1e38)  # a row's top before it has seen a key: finite, so that nothing is inf - inf


def thought_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: ThoughtLayout,
    scale: float, window: int | None, softcap: float | None, sinks: Tensor | None, query_rows: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.thought_attention``."""
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    out = q.new_empty((B, H, rows, E))
    lse = q.new_empty((B, H, rows), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    config = pick(ATTENTION_FORWARD, q.element_size(), max(K, E))
    HG, BLOCK_M = H // G, config.blocks["BLOCK_M"]
    tiles = triton.cdiv(layout.R * HG, BLOCK_M) + triton.cdiv((rows - layout.R) * HG, BLOCK_M)
    attention_forward[(tiles * B * G,)](
        q, k, v, sinks, layout.anchor.contiguous(), layout.lo.contiguous(), layout.length.contiguous(), out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        B, G, HG, rows, layout.L, layout.P, layout.N, layout.S, window, scale, softcap,
        K=K, E=E, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_E=max(16, triton.next_power_of_2(E)),
        PRECISION=dot_precision(), **config.options(),
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["B", "G", "HG", "rows", "L", "P", "N", "S", "window"])
def attention_forward(
    q, k, v, sinks, anchor, lo, length, out, lse,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_km,
    stride_vb, stride_vg, stride_vm, stride_ob, stride_oh, stride_om,
    B, G, HG, rows, L, P, N, S, window, scale, softcap,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr,
    SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R = P * N * S
    pair = (tl.program_id(0) % (B * G)).to(tl.int64)
    b, g = pair // G, pair % G
    tile, tiles = tl.program_id(0) // (B * G), tl.num_programs(0) // (B * G)
    flat, begin, end = tile_start(tile, tiles, L, R, HG, BLOCK_M)
    m, h, inside = tile_rows(flat, begin, end, HG, BLOCK_M)
    k += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
    lo += b * L

    first, last, own_first, on = seen_by(m, inside, anchor + b * P, lo, length + b * P * N, L, N, S, FAR)
    if window is not None:
        # A text row's own_first is m + 1, a thought row's m - s.
        oldest = last - first + (m - own_first) + 2 - window  # position id
        own_first = tl.maximum(own_first, m - window + 1)

    skipped = L + R - rows  # packed rows before the first query row
    q += b * stride_qb + g * HG * stride_qh
    queries = load_tile(q, h.to(tl.int64) * stride_qh + (m - skipped).to(tl.int64) * stride_qm, on, K, BLOCK_K)
    factor = scale * LOG2_E if softcap is None else LOG2_E
    if sinks is None:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        sink = tl.load(sinks + g * HG + h, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        top = tl.where(sink < LOWEST, LOWEST, sink)
        total = tl.exp2(sink - top)

    # Own rows first: only the queries are live then. A chunk of rows is a matrix of its own here.
    CHUNKS: tl.constexpr = BLOCK_M // OWN
    chunk_first, chunk_last, blocks = own_chunks(flat, L, R, S, HG, BLOCK_M)
    blocks *= tl.max((on & (own_first <= m)).to(tl.int32), 0)
    chunk_queries = tl.reshape(queries, [CHUNKS, OWN, BLOCK_K])
    chunk_own_first = tl.reshape(own_first, [CHUNKS, OWN, 1])
    chunk_own_count = tl.reshape(m - own_first + 1, [CHUNKS, OWN, 1])
    top, total = tl.reshape(top, [CHUNKS, OWN]), tl.reshape(total, [CHUNKS, OWN])
    acc = tl.zeros([CHUNKS, OWN, BLOCK_E], tl.float32)
    for j in tl.range(blocks, num_stages=1):
        n = chunk_first[:, None] + (j * OWN + tl.arange(0, OWN))
        there = n <= chunk_last[:, None]
        keys = load_tile(k, n.to(tl.int64) * stride_km, there, K, BLOCK_K)
        values, poison = without_poison(load_tile(v, n.to(tl.int64) * stride_vm, there, E, BLOCK_E))
        s = scores(chunk_queries, keys, scale, softcap, SLICES, PRECISION)
        seen = in_range(n[:, None, :], chunk_own_first, chunk_own_count)
        s = tl.where(seen, s + poison[:, None, :], -float("inf"))
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    top, total = tl.reshape(top, [BLOCK_M]), tl.reshape(total, [BLOCK_M])
    acc = tl.reshape(acc, [BLOCK_M, BLOCK_E])

    start, all_from, all_to, text_end = text_bounds(first, last, on)
    if window is not None:
        start, all_from = window_bounds(start, all_from, text_end, oldest, on, lo, 1024)
    before, full, edges = cover(start, all_from, all_to, text_end, BLOCK_N, BLOCK_EDGE)
    i = tl.arange(0, BLOCK_N)
    all_there = i < BLOCK_N
    for j in tl.range(full):
        n0 = start + before * BLOCK_EDGE + j * BLOCK_N
        keys = load_tile(k + n0.to(tl.int64) * stride_km, i * stride_km, all_there, K, BLOCK_K)
        values = load_tile(v + n0.to(tl.int64) * stride_vm, i * stride_vm, all_there, E, BLOCK_E)
        s = scores(queries, keys, scale, softcap, SLICES, PRECISION)
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)

    i = tl.arange(0, BLOCK_EDGE)
    for j in tl.range(edges):
        n0 = start + j * BLOCK_EDGE + tl.where(j < before, 0, full * BLOCK_N)
        n = n0 + i
        keys = load_tile(k + n0.to(tl.int64) * stride_km, i * stride_km, n < L, K, BLOCK_K)
        values = load_tile(v + n0.to(tl.int64) * stride_vm, i * stride_vm, n < L, E, BLOCK_E)
        values, poison = without_poison(values)
        s = scores(queries, keys, scale, softcap, SLICES, PRECISION)
        seen = in_range(n[None, :], first[:, None], (last - first + 1)[:, None])
        if window is not None:
            seen &= (n - tl.load(lo + n, mask=n < L, other=0))[None, :] >= oldest[:, None]
        s = tl.where(seen, s + poison[None, :], -float("inf"))
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)

    # The rows are counted anew, from a start that the compiler can't know to be the same: else their addresses would take
    # registers from the beginning to here.
    m, h, inside = tile_rows(flat + tl.minimum(edges, 0), begin, end, HG, BLOCK_M)
    row = m - skipped
    total = tl.where(on, total, 1.0)
    result = tl.where(on[:, None], acc / total[:, None], 0.0)
    out += b * stride_ob + g * HG * stride_oh
    store_tile(out, h.to(tl.int64) * stride_oh + row.to(tl.int64) * stride_om, inside, result, E, BLOCK_E)
    natural = tl.where(on, top * LN_2 + tl.log(total), -float("inf"))
    tl.store(lse + (pair * HG + h) * rows + row, natural, mask=inside)


@triton.jit
def scores(queries, keys, scale, softcap, SLICES: tl.constexpr, PRECISION: tl.constexpr):
    """queries [..,rows,K] times keys [..,columns,K]: [..,rows,columns]; with a soft cap scaled and capped, else not yet scaled.

    SLICES cuts K, at most into sixteens: warps then share the columns of the factors, which for fp32 fill too many registers.
    """
    WIDTH: tl.constexpr = max(16, queries.shape[-1] // SLICES)
    COUNT: tl.constexpr = queries.shape[-1] // WIDTH
    if COUNT > 1:
        products = tl.dot(slices(queries, COUNT), tl.permute(slices(keys, COUNT), [0, 2, 1]), input_precision=PRECISION)
        s = tl.sum(tl.reshape(products, [products.shape[0] // COUNT, COUNT, products.shape[1], products.shape[2]]), 1)
        if len(queries.shape) == 2:
            s = tl.reshape(s, [queries.shape[0], keys.shape[0]])
    elif len(queries.shape) == 2:
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    else:
        s = tl.dot(queries, tl.permute(keys, [0, 2, 1]), input_precision=PRECISION)
    return s if softcap is None else softcap * tanh(s * (scale / softcap))


@triton.jit
def slices(x, COUNT: tl.constexpr):
    """[rows,K] or [chunks,rows,K] to [chunks * COUNT, rows, K / COUNT]."""
    rows: tl.constexpr = x.shape[-2]
    width: tl.constexpr = x.shape[-1] // COUNT
    chunks: tl.constexpr = x.numel // (rows * COUNT * width)
    x = tl.permute(tl.reshape(x, [chunks, rows, COUNT, width]), [0, 2, 1, 3])
    return tl.reshape(x, [chunks * COUNT, rows, width])


@triton.jit
def softmax_step(s, factor, top, total, acc):
    """Weights of new scores, which times ``factor`` are in units of log 2; top, total and acc brought up to date.

    A row's sum of weights so far is ``total`` times 2^top, its weighted sum of values ``acc`` times 2^top.
    """
    new_top = tl.maximum(top, tl.max(s, axis=-1) * factor)
    p = tl.exp2(s * factor - tl.expand_dims(new_top, -1))
    decay = tl.exp2(top - new_top)
    return p, new_top, total * decay + tl.sum(p, axis=-1), acc * tl.expand_dims(decay, -1)


@triton.jit
def without_poison(values):
    """Values [..,keys,E] with 0 for NaN and infinity, and [..,keys], NaN for a key that has such a value, else 0.

    Added to a key's scores it makes the rows that see the key NaN; the others must not meet 0 * NaN.
    """
    zero = values.to(tl.float32) * 0.0
    return tl.where(zero == 0.0, values, 0.0), tl.sum(zero, axis=-1)
