"""Gradients of keys and values: a program takes BLOCK_N keys of one head and goes over the query rows that may see them.

dv = p^T dO, dk = scale * dS^T q. One kernel, launched for the text and for the thought rows: it differs in which rows it
takes. Rows of all query heads of the group make one flat loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._attention_backward_rows import Rows
from quietstar_kernels.triton._attention_weights import weights
from quietstar_kernels.triton._rows import FAR
from quietstar_kernels.triton._target import dot_precision
from quietstar_kernels.triton._tiles import in_range, load_tile, store_tile
from quietstar_kernels.triton.configs import (
    ATTENTION_BACKWARD_OWN_KEYS,
    ATTENTION_BACKWARD_RANGES,
    ATTENTION_BACKWARD_TEXT_KEYS,
    Config,
    pick,
)

PROGRAMS = 264  # that keep a GPU busy: two for each of 132 multiprocessors
PARTS = 8  # pieces a text block's rows are cut in, at most


def key_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: Rows, layout: ThoughtLayout, window: int | None,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, in the shapes and dtypes of k and v; 0 in rows that are off and text that no query row sees."""
    B, G, K, E = *k.shape[:2], k.shape[-1], v.shape[-1]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if layout.R:
        config = pick(ATTENTION_BACKWARD_OWN_KEYS, q.element_size(), max(K, E))
        _launch(grad_out, q, k, v, tables, layout, None, scale, softcap, dk[None], dv[None], config)
    if layout.L:
        config = pick(ATTENTION_BACKWARD_TEXT_KEYS, q.element_size(), max(K, E))
        ranges = row_ranges(layout, window, q.shape[2], config.blocks["BLOCK_N"])
        # Few long blocks don't fill a GPU: their rows are cut in parts, whose sums are added in order.
        parts = min(PARTS, triton.cdiv(PROGRAMS, B * G * ranges.shape[1]))
        dk_parts = torch.empty((parts, B, G, layout.L, K), dtype=torch.float32, device=k.device)
        dv_parts = torch.empty((parts, B, G, layout.L, E), dtype=torch.float32, device=k.device)
        _launch(grad_out, q, k, v, tables, layout, ranges, scale, softcap, dk_parts, dv_parts, config)
        dk[:, :, : layout.L] = dk_parts.sum(0)
        dv[:, :, : layout.L] = dv_parts.sum(0)
    return dk, dv


def _launch(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: Rows, layout: ThoughtLayout, ranges: Tensor | None,
    scale: float, softcap: float | None, dk: Tensor, dv: Tensor, config: Config,
) -> None:  # fmt: skip
    """Keys of the text where there are ``ranges``, else of the thought rows; dk and dv have a first dimension of parts."""
    (B, H, rows, K), G, E = q.shape, k.shape[1], v.shape[-1]
    parts = dk.shape[0]
    first, count = (tables.own_first, tables.own_count) if ranges is None else (tables.first, tables.count)
    blocks = triton.cdiv(layout.R if ranges is None else layout.L, config.blocks["BLOCK_N"])
    attention_backward_keys[(blocks * parts * B * G,)](
        grad_out, q, k, v, tables.delta, tables.lse, first, count, None if ranges is None else tables.oldest,
        layout.lo.contiguous(), ranges, dk, dv,
        *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dk.stride()[:4], *dv.stride()[:4],
        B, G, H // G, rows, layout.L, layout.M, layout.N, layout.S, parts, scale, softcap,
        K=K, E=E, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_E=max(16, triton.next_power_of_2(E)),
        PRECISION=dot_precision(), **config.options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "G", "HG", "rows", "L", "M", "N", "S", "parts"])
def attention_backward_keys(
    grad_out, q, k, v, delta, lse, first_table, count_table, oldest_table, lo, ranges, dk, dv,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_km,
    stride_vb, stride_vg, stride_vm, stride_dkp, stride_dkb, stride_dkg, stride_dkm, stride_dvp, stride_dvb, stride_dvg, stride_dvm,
    B, G, HG, rows, L, M, N, S, parts, scale, softcap,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) % (B * G)).to(tl.int64)
    b, g = pair // G, pair % G
    part = (tl.program_id(0) // (B * G)) % parts
    block = tl.program_id(0) // (B * G) // parts
    thoughts = rows - (M - L)  # the first thought row, among the query rows
    if ranges is None:
        n0, end = L + block * BLOCK_N, M
        text_tiles = 0
        thought_start = thoughts + block * BLOCK_N
        thought_end = tl.minimum(thoughts + ((block + 1) * BLOCK_N - 1) // S * S + S, rows)
        text_end = 0
    else:
        n0, end = block * BLOCK_N, L
        ranges += (b * tl.cdiv(L, BLOCK_N) + block) * 3
        text_end = tl.load(ranges)
        text_tiles = tl.cdiv(tl.maximum(text_end - n0, 0), BLOCK_M)
        thought_start = thoughts + tl.load(ranges + 1) * N * S
        thought_end = thoughts + tl.load(ranges + 2) * N * S
    tiles = text_tiles + tl.cdiv(thought_end - thought_start, BLOCK_M)

    i = tl.arange(0, BLOCK_N)
    n = n0 + i
    keys = load_tile(k + b * stride_kb + g * stride_kg + n0.to(tl.int64) * stride_km, i * stride_km, n < end, K, BLOCK_K)
    values = load_tile(v + b * stride_vb + g * stride_vg + n0.to(tl.int64) * stride_vm, i * stride_vm, n < end, E, BLOCK_E)
    position = n - tl.load(lo + b * L + n, mask=n < L, other=0)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    i = tl.arange(0, BLOCK_M)
    for j in tl.range(part * HG * tiles // parts, (part + 1) * HG * tiles // parts):
        h = (g * HG + j // tiles).to(tl.int64)
        tile = j % tiles
        in_text = tile < text_tiles
        row0 = tl.where(in_text, n0 + tile * BLOCK_M, thought_start + (tile - text_tiles) * BLOCK_M)
        row = row0 + i
        inside = row < tl.where(in_text, text_end, thought_end)
        row_lse = tl.load(lse + (b * (G * HG) + h) * rows + row, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + (b * (G * HG) + h) * rows + row, mask=inside, other=0.0)
        first = tl.load(first_table + b * rows + row, mask=inside, other=0)
        count = tl.load(count_table + b * rows + row, mask=inside, other=0)
        adds = row_lse < float("inf")
        row0 = row0.to(tl.int64)
        queries = load_tile(q + b * stride_qb + h * stride_qh + row0 * stride_qm, i * stride_qm, adds, K, BLOCK_K)
        grads = load_tile(grad_out + b * stride_gb + h * stride_gh + row0 * stride_gm, i * stride_gm, adds, E, BLOCK_E)
        qk = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p, slope = weights(qk, row_lse[None, :], scale, softcap)
        seen = in_range(n[:, None], first[None, :], tl.where(adds, count, 0)[None, :])
        if oldest_table is not None:
            oldest = tl.load(oldest_table + b * rows + row, mask=inside, other=0)
            seen = seen & (position[:, None] >= oldest[None, :])
        p = tl.where(seen, p, 0.0)
        dv_acc = tl.dot(p.to(grads.dtype), grads, dv_acc, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        ds = tl.where(seen, p * (dp - row_delta[None, :]) * slope, 0.0)
        dk_acc = tl.dot(ds.to(queries.dtype), queries, dk_acc, input_precision=PRECISION)

    dk += part.to(tl.int64) * stride_dkp + b * stride_dkb + g * stride_dkg
    dv += part.to(tl.int64) * stride_dvp + b * stride_dvb + g * stride_dvg
    store_tile(dk, n.to(tl.int64) * stride_dkm, n < end, dk_acc * scale, K, BLOCK_K)
    store_tile(dv, n.to(tl.int64) * stride_dvm, n < end, dv_acc, E, BLOCK_E)


def row_ranges(layout: ThoughtLayout, window: int | None, rows: int, block: int) -> Tensor:
    """int32 [B,L/block,3]: for a block of text, the end of the text rows that may see it (0 where ``rows`` are thoughts
    alone), and the first and the end of the places whose thoughts may. None outside sees it; some inside may not.
    """
    config = ATTENTION_BACKWARD_RANGES
    blocks = triton.cdiv(layout.L, block)
    ranges = torch.empty((layout.B, blocks, 3), dtype=torch.int32, device=layout.device)
    attention_ranges[(layout.B * blocks,)](
        layout.anchor.contiguous(), layout.lo.contiguous(), ranges,
        layout.L, layout.P, int(rows > layout.R), layout.L if window is None else window,
        BLOCK_N=block, **config.options(),
    )  # fmt: skip
    return ranges


@triton.jit(do_not_specialize=["L", "P", "text_rows", "window"])
def attention_ranges(anchor, lo, ranges, L, P, text_rows, window, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(L, BLOCK_N)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    anchor += b * P
    lo += b * L
    start, end = block * BLOCK_N, (block + 1) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    highest_id = tl.max(n - tl.load(lo + n, mask=n < L, other=FAR), 0)
    text_end = start
    for t0 in tl.range(start, L, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        first = tl.load(lo + t, mask=t < L, other=FAR)
        sees = (first < end) & (t - first - window < highest_id)
        text_end = tl.maximum(text_end, tl.max(tl.where(sees, t + 1, 0), 0))
    before, until = 0, 0
    for p0 in tl.range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        t = tl.load(anchor + p, mask=p < P, other=-1)
        before += tl.sum(((t >= 0) & (t < start)).to(tl.int32), 0)
        until += tl.sum(((t >= 0) & (t < text_end)).to(tl.int32), 0)
    ranges += tl.program_id(0) * 3
    tl.store(ranges, text_end * text_rows)
    tl.store(ranges + 1, before)
    tl.store(ranges + 2, until)
