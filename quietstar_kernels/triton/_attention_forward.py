"""Forward of thought_attention: a program takes BLOCK_M query rows of one key head and goes over their keys block by block.

The H/G query heads of a key head are folded into the rows: flat row f is packed row f // HG under head f % HG. Text rows and
thought rows have tiles of their own. The keys of a tile, in this order:

1. own rows, by 3D dots: each chunk of 16 flat rows against windows of 16 keys that start at its first row's thought;
2. text that all rows see, in blocks of BLOCK_N without a mask;
3. text at the edges, which some rows see, in masked blocks of BLOCK_EDGE.

Scores are kept in units of log2: exp(x) is exp2(x * log2(e)).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._math import tanh
from quietstar_kernels.triton._rows import OWN, own_chunks, seen_by, text_blocks, tile_start
from quietstar_kernels.triton._target import dot_precision
from quietstar_kernels.triton.configs import ATTENTION_FORWARD, pick

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN_2: tl.constexpr = tl.constexpr(math.log(2))
LOWEST: tl.constexpr = tl.constexpr(-1e38)  # a row's top before it has seen a key: finite, so that nothing is inf - inf
NO_WINDOW = 1 << 30


def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThoughtLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    query_rows: str,
) -> tuple[Tensor, Tensor]:
    """As ``reference.thought_attention``."""
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    out = q.new_empty((B, H, rows, E))
    lse = q.new_empty((B, H, rows), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    config = pick(ATTENTION_FORWARD, q.element_size(), max(K, E))
    HG, skip = H // G, 0 if query_rows == "all" else layout.L
    tiles = triton.cdiv(layout.R * HG, config.blocks["BLOCK_M"]) + triton.cdiv((layout.L - skip) * HG, config.blocks["BLOCK_M"])
    attention_forward[(tiles * B * G,)](
        q,
        k,
        v,
        out,
        lse,
        sinks,
        layout.anchor.contiguous(),
        layout.lo.contiguous(),
        layout.length.contiguous(),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *lse.stride()[:2],
        layout.L,
        layout.P,
        layout.N,
        layout.S,
        B,
        G,
        HG,
        skip,
        NO_WINDOW if window is None else window,
        scale,
        softcap,
        K=K,
        E=E,
        BLOCK_K=max(16, triton.next_power_of_2(K)),
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        PRECISION=dot_precision(),
        **config.options(),
    )
    return out, lse


@triton.jit(do_not_specialize=["L", "P", "N", "S", "B", "G", "HG", "skip", "window"])
def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    anchor,
    lo,
    length,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kg,
    stride_km,
    stride_vb,
    stride_vg,
    stride_vm,
    stride_ob,
    stride_oh,
    stride_om,
    stride_lb,
    stride_lh,
    L,
    P,
    N,
    S,
    B,
    G,
    HG,
    skip,
    window,
    scale,
    softcap,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = (tl.program_id(0) % (B * G)).to(tl.int64)
    b, g = pair // G, pair % G
    tile, tiles = tl.program_id(0) // (B * G), tl.num_programs(0) // (B * G)
    R = P * N * S
    flat, begin, end = tile_start(tile, tiles, L, R, HG, BLOCK_M)
    f = flat + tl.arange(0, BLOCK_M)
    m, h = begin + f // HG, f % HG
    inside = m < end
    first, last, own_first, on = seen_by(m, inside, anchor + b * P, lo + b * L, length + b * P * N, L, N, S, window)
    row = (m - skip).to(tl.int64)
    h += g * HG
    k += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
    dk, de = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    q += b * stride_qb + (h * stride_qh + row * stride_qm)[:, None] + dk
    queries = tl.load(q, mask=on[:, None] & (dk < K), other=0.0)

    if sinks is None:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        sink = tl.load(sinks + h, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        top = tl.where(sink < LOWEST, LOWEST, sink)
        total = tl.exp2(sink - top)
    factor = scale * LOG2_E if softcap is None else LOG2_E

    # Own rows first: only the queries are live then. A chunk of rows is a matrix of its own here.
    CHUNKS: tl.constexpr = BLOCK_M // OWN
    chunk_first, chunk_last, blocks = own_chunks(flat, L, R, S, HG, BLOCK_M)
    blocks *= tl.max((on & (own_first <= m)).to(tl.int32), 0)
    chunk_queries = tl.reshape(queries, [CHUNKS, OWN, BLOCK_K])
    chunk_m, chunk_own_first = tl.reshape(m, [CHUNKS, OWN, 1]), tl.reshape(own_first, [CHUNKS, OWN, 1])
    top, total = tl.reshape(top, [CHUNKS, OWN]), tl.reshape(total, [CHUNKS, OWN])
    acc = tl.zeros([CHUNKS, OWN, BLOCK_E], tl.float32)
    for j in tl.range(blocks, num_stages=1):
        n = chunk_first[:, None] + (j * OWN + tl.arange(0, OWN))
        there = (n <= chunk_last[:, None])[:, :, None]
        at = n.to(tl.int64)[:, :, None]
        keys = tl.load(k + at * stride_km + dk, mask=there & (dk < K), other=0.0)
        values = tl.load(v + at * stride_vm + de, mask=there & (de < E), other=0.0)
        values, poison = without_poison(values)
        s = scores(chunk_queries, tl.permute(keys, [0, 2, 1]), scale, softcap, PRECISION)
        seen = (n[:, None, :] >= chunk_own_first) & (n[:, None, :] <= chunk_m)
        s = tl.where(seen, s + poison[:, None, :], -float("inf"))
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    top, total = tl.reshape(top, [BLOCK_M]), tl.reshape(total, [BLOCK_M])
    acc = tl.reshape(acc, [BLOCK_M, BLOCK_E])

    start, before, full, edges = text_blocks(first, last, on, BLOCK_N, BLOCK_EDGE)
    k_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_km + dk
    v_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_vm + de
    full_start = start + before * BLOCK_EDGE
    for j in tl.range(full):
        n0 = (full_start + j * BLOCK_N).to(tl.int64)
        keys = tl.load(k + n0 * stride_km + k_offsets, mask=dk[None, :] < K, other=0.0)
        values = tl.load(v + n0 * stride_vm + v_offsets, mask=de[None, :] < E, other=0.0)
        s = scores(queries, tl.trans(keys), scale, softcap, PRECISION)
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)

    k_offsets = tl.arange(0, BLOCK_EDGE)[:, None] * stride_km + dk
    v_offsets = tl.arange(0, BLOCK_EDGE)[:, None] * stride_vm + de
    for j in tl.range(edges):
        n = start + j * BLOCK_EDGE + tl.where(j < before, 0, full * BLOCK_N)
        n0 = n.to(tl.int64)
        n += tl.arange(0, BLOCK_EDGE)
        there = (n < L)[:, None]
        keys = tl.load(k + n0 * stride_km + k_offsets, mask=there & (dk < K), other=0.0)
        values = tl.load(v + n0 * stride_vm + v_offsets, mask=there & (de < E), other=0.0)
        values, poison = without_poison(values)
        s = scores(queries, tl.trans(keys), scale, softcap, PRECISION)
        seen = (n >= first[:, None]) & (n <= last[:, None])
        s = tl.where(seen, s + poison, -float("inf"))
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)

    out += b * stride_ob + (h * stride_oh + row * stride_om)[:, None] + de
    lse += b * stride_lb + h * stride_lh + row
    total = tl.where(on, total, 1.0)
    result = tl.where(on[:, None], acc / total[:, None], 0.0)
    tl.store(out, result.to(out.dtype.element_ty), mask=inside[:, None] & (de < E))
    tl.store(lse, tl.where(on, top * LN_2 + tl.log(total), -float("inf")), mask=inside)


@triton.jit
def scores(queries, keys, scale, softcap, PRECISION: tl.constexpr):
    """queries [..,rows,K] times keys [..,K,columns]; with a soft cap scaled and capped, else not yet scaled."""
    s = tl.dot(queries, keys, input_precision=PRECISION)
    return s if softcap is None else softcap * tanh(s * (scale / softcap))


@triton.jit
def softmax_step(s, factor, top, total, acc):
    """Weights of new scores (in units of log2 once multiplied by ``factor``); top, total and acc brought up to date.

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
