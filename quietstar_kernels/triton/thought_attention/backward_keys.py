"""Gradients of keys and values: a program takes BLOCK_N keys of one head and loops over the query rows that may see them.

dv = p^T dO, dk = scale * dS^T q. One kernel is launched for the text and again for the branch rows, which differ only in the
query rows. The rows of all query heads of the group make one flat loop. The text's sums are in parts, which a last kernel adds
up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...branches import Branches
from .._device import FAR, Layout, Stride, in_range, load_tile, row_tile, scores, store_tile, taking_turns, weights
from .._launch import Launch, Plan, cdiv, padded, pairs_together, tile_of
from ..configs import (
    ATTENTION_BACKWARD_OWN_KEYS,
    ATTENTION_BACKWARD_RANGES,
    ATTENTION_BACKWARD_SHORT_KEYS,
    ATTENTION_BACKWARD_SUM,
    ATTENTION_BACKWARD_TEXT_KEYS,
    Config,
    pick,
)
from .backward import Inputs

# Blocks of text make few programs, which run long and unequally so, as the first keys are seen by the most rows. So their rows
# are split into parts whose sums are added in order: enough for PROGRAMS, eight on each of 132 multiprocessors, but at most
# PARTS, and with TILES row tiles each on average.
PROGRAMS, PARTS, TILES = 1056, 8, 16
# Rows of a branch, on average: up to SHORT, and from LONG on, its keys have other tiles, the latter those of text if there are
# so many programs.
SHORT, LONG, LONG_PROGRAMS = 16, 128, 264


def key_gradients(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """dk and dv, with the shapes and dtypes of k and v; 0 for rows that are off and for text that no query row sees."""
    _, q, k, v, branches, _, _, _, known, in_gluon = inputs
    (B, G, _, K), E, L = k.shape, v.shape[-1], branches.L
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)

    def choose() -> tuple[Config, Config, int]:
        config, own_config = configs_of(branches, G, q.element_size(), max(K, E), in_gluon)
        keys, rows = (128, 64) if in_gluon else (config.blocks["BLOCK_N"], config.blocks["BLOCK_M"])
        tiles = q.shape[1] // G * cdiv(q.shape[2], rows)
        parts = min(PARTS, cdiv(PROGRAMS, B * G * cdiv(L, keys)), tiles // TILES) if L else 0
        return config, own_config, max(1, parts)

    config, own_config, parts = known.once("keys", choose)
    if branches.R:
        _launch(inputs, None, dk, dv, 1, own_config)
    if L:
        ranges = row_ranges(inputs, 64 if in_gluon else config.blocks["BLOCK_N"])
        dk_parts = k.new_empty((parts, B, G, L, K), dtype=torch.float32)
        dv_parts = k.new_empty((parts, B, G, L, E), dtype=torch.float32)
        if in_gluon:
            from . import gluon_backward_keys  # imports Gluon

            gluon_backward_keys.launch(inputs, ranges, dk_parts, dv_parts, parts)
        else:
            _launch(inputs, ranges, dk_parts, dv_parts, parts, config)
        add_parts(dk_parts, dv_parts, dk, dv, known)
    return dk, dv


def configs_of(branches: Branches, G: int, itemsize: int, width: int, in_gluon: bool) -> tuple[Config, Config]:
    """The tiles for keys of the text and of the branches."""
    text = pick(ATTENTION_BACKWARD_TEXT_KEYS, itemsize, width)
    programs = branches.B * G * cdiv(branches.R, text.blocks["BLOCK_N"])
    if branches.R >= LONG * branches.C and programs >= LONG_PROGRAMS:
        return text, text
    short = [ATTENTION_BACKWARD_SHORT_KEYS] * (in_gluon and branches.R <= SHORT * branches.C)
    return text, pick([*short, ATTENTION_BACKWARD_OWN_KEYS], itemsize, width)


def whole_branches(branches: Branches, most: int) -> int:
    """How many own keys a program takes: ``most``, or fewer, so that branches of one length are not cut."""
    length, rest = divmod(branches.R, max(branches.C, 1))
    return most if rest or length > most else most // length * length


def _launch(inputs: Inputs, ranges: Tensor | None, dk: Tensor, dv: Tensor, parts: int, config: Config) -> None:
    """For keys of the text if there are ``ranges``, else of the branch rows.

    dk [(parts),B,G,L or M,K] and dv [(parts),B,G,L or M,E] are contiguous.
    """
    grad_out, q, k, v, branches, layout, (scale, window, softcap, _), tables, known, _ = inputs
    K, E = k.shape[3], v.shape[3]
    kind = "text keys"
    if ranges is None:  # the kernel reads one range of keys for each row
        kind, tables = "own keys", tables._replace(first=tables.own_first, text_count=tables.own_count, oldest=None)

    def prepare() -> Launch:
        (B, H, rows, _), G, L, M = q.shape, k.shape[1], branches.L, branches.M
        keys, step = L, config.blocks["BLOCK_N"]
        if ranges is None:
            keys, step = branches.R, whole_branches(branches, step)
        within = M if window is None else min(window, M)
        strides = tuple(Stride(*x.stride()[:3]) for x in (grad_out, q, k, v))
        together = pairs_together(B * G, H // G * rows, K + E, q.element_size())
        sizes = B, G, together, H // G, rows, L, M, branches.C, int(branches.full), within, parts, step
        numbers = strides, *sizes, scale, softcap
        return Launch(attention_backward_keys, (cdiv(keys, step) * parts * B * G,), numbers, {"tile": tile_of(config, K, E)})

    if ranges is not None:  # which the rows of a node see as those of any branch do
        layout = [*layout[:3], None, None]
    tensors = grad_out, q, k, v, tables, *layout, ranges
    if max(K, E) * q.element_size() > 256:  # with wide heads, registers only hold one of the two sums
        known.launch(f"{kind}, dk", config, (*tensors, dk, None), prepare)
        known.launch(f"{kind}, dv", config, (*tensors, None, dv), prepare)
    else:
        known.launch(kind, config, (*tensors, dk, dv), prepare)


def _name(specialization: Any) -> str:
    return f"attention_backward_{'own' if 'ranges' in specialization.constants else 'text'}_keys"


@triton.jit(
    do_not_specialize=["B", "G", "together", "HG", "rows", "L", "M", "C", "full_own", "window", "parts", "step"],
    do_not_specialize_on_alignment=["lo", "table", "of_row", "tree", "path"],
    repr=_name,
)
def attention_backward_keys(
    grad_out, q, k, v, tables, lo, table, of_row, tree, path, ranges, dk, dv, strides,
    B, G, together, HG, rows, L, M, C, full_own, window, parts, step, scale, softcap, tile,
):  # fmt: skip
    stride_g, stride_q, stride_k, stride_v = strides
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    pair, turn = taking_turns(B * G, together)
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    if tree is not None:
        tree += b * C * 4
        path += b * (M - L) * 2
    layout = Layout(lo + b * L, table + b * C * 3, of_row + b * (M - L), tree, path)
    part, block = turn % parts, turn // parts
    before = rows - (M - L)  # query rows before the first branch row
    if ranges is None:
        n0 = L + block * step
        end, size = tl.minimum(n0 + step, M), M
        text_tiles = 0
        text_end = 0
        if tree is None:
            own_start, own_end = rows_of_keys(layout, n0 - L, end - L, full_own, window, BLOCK_N)
        else:
            of_keys = rows_of_nodes(layout, n0 - L, end - L, full_own, BLOCK_N)
            seen_first, seen_count, key_row, own_start, own_end = of_keys
    else:
        n0, end, size = block * step, L, L
        ranges += (b * tl.cdiv(L, BLOCK_N) + block) * 3
        text_end = tl.load(ranges)
        text_tiles = tl.cdiv(tl.maximum(text_end - n0, 0), BLOCK_M)
        own_start, own_end = tl.load(ranges + 1), tl.load(ranges + 2)
    own_start += before
    own_end += before
    tiles = text_tiles + tl.cdiv(own_end - own_start, BLOCK_M)

    i = tl.arange(0, BLOCK_N)
    n = n0 + i
    k += b * stride_k.b + g * stride_k.h + n0.to(tl.int64) * stride_k.m
    v += b * stride_v.b + g * stride_v.h + n0.to(tl.int64) * stride_v.m
    keys = load_tile(k, i * stride_k.m, n < end, tile.K, tile.BLOCK_K)  # [BLOCK_N, BLOCK_K]
    values = load_tile(v, i * stride_v.m, n < end, tile.E, tile.BLOCK_E)  # [BLOCK_N, BLOCK_E]
    if tables.oldest is not None:
        position = n - tl.load(layout.lo + n, mask=n < L, other=0)
    dk_acc = tl.zeros([BLOCK_N, tile.BLOCK_K], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, tile.BLOCK_E], tl.float32)
    i = tl.arange(0, BLOCK_M)
    begin, stop = part * HG * tiles // parts, (part + 1) * HG * tiles // parts
    # Rows that add nothing are not even loaded, as they may hold NaN. Their log-sum-exp is inf; it is read one tile ahead, so
    # that the loads of the rows need not wait for it. The other tables are read even past the last row: a mask would take a
    # tenth of the loop.
    lse = tables.lse + (b * G + g) * HG * rows
    delta = tables.delta + (b * G + g) * HG * rows
    q += b * stride_q.b + g * HG * stride_q.h
    grad_out += b * stride_g.b + g * HG * stride_g.h
    first_table = tables.first + b * rows
    count_table = tables.text_count + b * rows
    index, h = begin % tl.maximum(tiles, 1), (begin // tl.maximum(tiles, 1)).to(tl.int64)
    row0, row_end = row_tile(index, text_tiles, n0, text_end, own_start, own_end, BLOCK_M)
    row_end = tl.where(begin < stop, row_end, 0)
    next_lse = tl.load(lse + (h * rows + row0) + i, mask=i < row_end - row0, other=float("inf"))
    for j in tl.range(begin, stop):
        row_lse = next_lse
        adds = row_lse < float("inf")
        next_index = tl.where(index + 1 < tiles, index + 1, 0)
        next_h = tl.where(index + 1 < tiles, h, h + 1)
        next_row0, next_row_end = row_tile(next_index, text_tiles, n0, text_end, own_start, own_end, BLOCK_M)
        next_row_end = tl.where(j + 1 < stop, next_row_end, 0)
        next_lse = tl.load(lse + (next_h * rows + next_row0) + i, mask=i < next_row_end - next_row0, other=float("inf"))
        row_delta = tl.load(delta + (h * rows + row0) + i)
        first = tl.load(first_table + row0 + i)
        count = tl.load(count_table + row0 + i)
        count = tl.where(adds, count, 0)
        q_row0 = q + h * stride_q.h + row0.to(tl.int64) * stride_q.m
        queries = load_tile(q_row0, i * stride_q.m, adds, tile.K, tile.BLOCK_K)  # [BLOCK_M, BLOCK_K]
        g_row0 = grad_out + h * stride_g.h + row0.to(tl.int64) * stride_g.m
        grads = load_tile(g_row0, i * stride_g.m, adds, tile.E, tile.BLOCK_E)  # [BLOCK_M, BLOCK_E]
        qk = scores(keys, queries, scale, None, tile.SLICES, tile.PRECISION)  # [BLOCK_N, BLOCK_M]
        p, slope = weights(qk, row_lse[None, :], scale, softcap, keys.dtype)
        if tree is None:
            seen = in_range(n[:, None], first[None, :], count[None, :])
        else:  # ``first`` is a row of the path
            seen = in_range((row0 - before + i)[None, :], seen_first[:, None], seen_count[:, None])
            seen &= adds[None, :] & (key_row[:, None] >= first[None, :])
        if tables.oldest is not None:
            oldest = tl.load(tables.oldest + (b * rows + row0) + i)
            seen = seen & (position[:, None] >= oldest[None, :])
        p = tl.where(seen, p, 0.0)
        if dv is not None:
            dv_acc = tl.dot(p.to(grads.dtype), grads, dv_acc, input_precision=tile.PRECISION)
        if dk is not None:
            dp = scores(values, grads, scale, None, tile.SLICES, tile.PRECISION)
            # Where p is not 0 the row sees the key, and dp is finite. As a mask ``seen`` would have to be kept across products.
            ds = tl.where(p > 0.0, p * (dp - row_delta[None, :]) * slope, 0.0)
            dk_acc = tl.dot(ds.to(queries.dtype), queries, dk_acc, input_precision=tile.PRECISION)
        index, h, row0, row_end = next_index, next_h, next_row0, next_row_end

    n_first = (part * (B * G) + pair).to(tl.int64) * size + n0  # in dk and dv [parts,B,G,size,..], contiguous
    # From a start that the compiler can't know to be 0. Else it would keep rows from above in registers.
    i = tl.arange(0, BLOCK_N) + tl.minimum(tiles, 0)
    if dk is not None:
        store_tile(dk + n_first * tile.K, i * tile.K, n0 + i < end, dk_acc * scale, tile.K, tile.BLOCK_K)
    if dv is not None:
        store_tile(dv + n_first * tile.E, i * tile.E, n0 + i < end, dv_acc, tile.E, tile.BLOCK_E)


@triton.jit
def rows_of_keys(layout, r0, stop, full_own, window, BLOCK_N: tl.constexpr):
    """First of the branch rows that may see the keys of branch rows r0..stop-1, at most BLOCK_N, and the row after the last."""
    _, table, of_row, _, _ = layout
    r = r0 + tl.arange(0, BLOCK_N)
    branch = tl.load(of_row + r, mask=r < stop, other=-1).to(tl.int64)
    live = branch >= 0
    start = tl.load(table + branch * 3 + 1, mask=live, other=0)
    length = tl.load(table + branch * 3 + 2, mask=live, other=0)
    end = tl.minimum(tl.max(tl.where(live, start + length, 0), 0), tl.max(tl.where(live, r, 0), 0) + window)
    return tl.minimum(tl.min(tl.where(live, tl.where(full_own != 0, start, r), FAR), 0), end), end


@triton.jit
def rows_of_nodes(layout, r0, stop, full_own, BLOCK_N: tl.constexpr):
    """For keys of branch rows r0..stop-1 in a tree, at most BLOCK_N: the first branch row that sees each without a window, how
    many do, and which row of its path it is; [BLOCK_N] each. Then the first of all these rows, and the row after the last.
    """
    _, table, of_row, tree, path = layout
    r = r0 + tl.arange(0, BLOCK_N)
    node = tl.load(of_row + r, mask=r < stop, other=-1).to(tl.int64)
    live = node >= 0
    row = r - tl.load(table + node * 3 + 1, mask=live, other=0)
    leaf = tl.load(tree + node * 4 + 2, mask=live, other=0)
    first = tl.where((full_own != 0) & (leaf != 0), r - row, r)
    end = tl.load(path + r * 2, mask=live, other=0)
    own_end = tl.max(end, 0)
    own_start = tl.minimum(tl.min(tl.where(live, first, FAR), 0), own_end)
    key_row = tl.load(path + r * 2 + 1, mask=live, other=0)
    return first, tl.where(live, end - first, 0), key_row, own_start, own_end


def row_ranges(inputs: Inputs, keys: int) -> Tensor:
    """int32 [B,L/keys,3]: for each block of text, the end of the text rows that may see it (0 if all rows are of branches),
    and the first branch row that may and the row after the last. No row outside sees it; some inside may not.
    """
    _, q, _, _, branches, (lo, table, *_), (_, window, _, _), _, known, _ = inputs
    config = ATTENTION_BACKWARD_RANGES
    B, L = branches.B, branches.L
    blocks = cdiv(L, keys)
    ranges = torch.empty((B, blocks, 3), dtype=torch.int32, device=branches.device)

    def prepare() -> Launch:
        numbers = L, branches.C, int(q.shape[2] > branches.R), L if window is None else window
        return Launch(attention_ranges, (B * blocks,), numbers, {"BLOCK_N": keys})

    known.launch("ranges", config, (lo, table, ranges), prepare)
    return ranges


@triton.jit(do_not_specialize=["L", "C", "text_rows", "window"], do_not_specialize_on_alignment=["lo", "table"])
def attention_ranges(lo, table, ranges, L, C, text_rows, window, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(L, BLOCK_N)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    lo += b * L
    table += b * C * 3
    start, end = block * BLOCK_N, (block + 1) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    highest_id = tl.max(n - tl.load(lo + n, mask=n < L, other=FAR), 0)
    text_end = start
    for t0 in tl.range(start, L, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        first = tl.load(lo + t, mask=t < L, other=FAR)
        sees = (first < end) & (t - first - window < highest_id)
        text_end = tl.maximum(text_end, tl.max(tl.where(sees, t + 1, 0), 0))
    own_start, own_end = start * 0 + FAR, start * 0
    for c0 in tl.range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        branch = table + c.to(tl.int64) * 3
        t = tl.load(branch, mask=c < C, other=-1)
        first = tl.load(branch + 1, mask=c < C, other=0)
        length = tl.load(branch + 2, mask=c < C, other=0)
        sees = (t >= start) & (t < text_end) & (length > 0)
        own_start = tl.minimum(own_start, tl.min(tl.where(sees, first, FAR), 0))
        own_end = tl.maximum(own_end, tl.max(tl.where(sees, first + length, 0), 0))
    ranges += tl.program_id(0) * 3
    tl.store(ranges, text_end * text_rows)
    tl.store(ranges + 1, tl.minimum(own_start, own_end))
    tl.store(ranges + 2, own_end)


def add_parts(dk_parts: Tensor, dv_parts: Tensor, dk: Tensor, dv: Tensor, known: Plan) -> None:
    """The first L rows of dk [B,G,M,K] and dv [B,G,M,E] from fp32 [parts,B,G,L,K] and [parts,B,G,L,E]; all contiguous."""
    parts, B, G, L, K = dk_parts.shape
    M, E = dv.shape[2:]
    config = ATTENTION_BACKWARD_SUM

    def prepare() -> Launch:
        programs = cdiv(L, config.blocks["BLOCK_R"]) * B * G
        constants = {"K": K, "E": E, "BLOCK_K": padded(K), "BLOCK_E": padded(E)}
        return Launch(attention_backward_sum, (programs,), (parts, B * G, L, M), constants)

    known.launch("sum", config, (dk_parts, dv_parts, dk, dv), prepare)


@triton.jit(do_not_specialize=["parts", "pairs", "L", "M"])
def attention_backward_sum(
    dk_parts, dv_parts, dk, dv, parts, pairs, L, M,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    n0 = tl.program_id(0) // pairs * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    inside = n0 + i < L
    dk_sum = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    dv_sum = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for part in tl.range(parts):
        first = (part * pairs + pair) * L + n0
        dk_sum += load_tile(dk_parts + first * K, i * K, inside, K, BLOCK_K)
        dv_sum += load_tile(dv_parts + first * E, i * E, inside, E, BLOCK_E)
    first = pair * M + n0
    store_tile(dk + first * K, i * K, inside, dk_sum, K, BLOCK_K)
    store_tile(dv + first * E, i * E, inside, dv_sum, E, BLOCK_E)
