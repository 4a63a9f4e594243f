"""thought_decode: a program takes BLOCK_M query rows of one key head, and all of their text or a part of it.

The H/G query heads of a key head are folded into the rows: flat row f is thought f // HG under head f % HG. The keys of a
tile are, in this order:

1. own rows of all thoughts of the tile up to the step, which the kernel reads on the device, in masked blocks of BLOCK_EDGE;
   then, in a tree, all rows of the nodes above, node after node;
2. text at the edges, which only some rows see, in masked blocks of BLOCK_EDGE too;
3. text that all rows see, in blocks of BLOCK_N without a mask.

If there are fewer tiles than processors, as in generation, the text of a tile is cut into parts, which a second kernel adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._options import AttentionOptions
from ._device import (
    FAR,
    LOG2_E,
    LOWEST,
    Limits,
    Stride,
    bounds,
    cover,
    divide,
    edge_block,
    in_range,
    load_rows,
    load_tile,
    scores,
    softmax_step,
    store_tile,
    taking_turns,
    tile_rows,
    tile_rows_again,
    window_bounds,
    without_poison,
)
from ._launch import Launch, Plan, cdiv, key_tiles, near, pairs_together, plan, tile_of
from .configs import THOUGHT_DECODE, THOUGHT_DECODE_OPTIONS, THOUGHT_DECODE_SUM, THOUGHT_DECODE_TREE, Config, pick

SMALLEST_PART = 4  # blocks of keys, enough to load one during the work on another


def thought_decode(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor, lo: Tensor, table: Tensor, step: Tensor,
    options: AttentionOptions, tree: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Implements ``reference.thought_decode``."""
    scale, window, softcap, sinks = options
    B, H, thoughts, K = q.shape
    G, L, E = v_text.shape[1:]
    out = q.new_empty(B, H, thoughts, E)
    if out.numel() == 0:
        return out
    layout = lo.contiguous(), table.contiguous(), None if tree is None else tree.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    k_text, v_text = near(k_text), near(v_text)
    dtypes = [None if x is None else x.dtype for x in (*layout, step, sinks)]  # their other facts follow from the sizes
    known = plan("thought_decode", (q, k_text, v_text, k_own, v_own), *dtypes, scale, window, softcap)

    def choose() -> tuple[Config, int, int]:
        plain = window is None and softcap is None and sinks is None
        first = THOUGHT_DECODE_TREE if tree is not None else THOUGHT_DECODE if plain else THOUGHT_DECODE_OPTIONS
        config = pick([first, THOUGHT_DECODE], q.element_size(), max(K, E))
        tiles = B * G * cdiv(thoughts * (H // G), config.blocks["BLOCK_M"])
        return config, tiles, splits_of(tiles, L, config.blocks["BLOCK_N"], q.device)

    config, tiles, splits = known.once("tiles", choose)
    parts = parts_of(out, splits)
    k_full, v_full = key_tiles(k_text, v_text, config, known, "BLOCK_N")

    def prepare() -> Launch:
        strides = [Stride(*x.stride()[:3]) for x in (q, k_text, v_text)]
        strides += [Stride(x.stride(0), x.stride(1), x.stride(3), x.stride(2)) for x in (k_own, v_own)]
        together = pairs_together(B * G, L, K + E, q.element_size())
        numbers = tuple(strides), B, G, together, H // G, L, thoughts, window, scale, softcap
        return Launch(_decode, (tiles, splits), numbers, {"tile": tile_of(config, K, E)})

    tensors = q, k_text, v_text, k_full, v_full, k_own, v_own, sinks, *layout, step, out, parts
    known.launch("decode", config, tensors, prepare)
    if splits > 1:
        add_parts(parts, splits, out, known)
    return out


def splits_of(tiles: int, L: int, block: int, device: torch.device) -> int:
    """Parts of the text for ``tiles`` programs: as many as fill the GPU once, each of at least a few blocks of keys."""
    # Without a GPU a few, so that tests have texts in parts.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(processors // tiles, L // (SMALLEST_PART * block)))


def parts_of(out: Tensor, splits: int) -> Tensor:
    """Room for the softmax states of all parts of ``out`` [B,H,C,E], fp32: acc [splits,rows,E], top and total [splits,rows].

    One tensor holds them one after another; it is empty if there is one part.
    """
    if splits == 1:
        return out.new_empty(0, dtype=torch.float32)
    rows = out.numel() // out.shape[-1]
    return out.new_empty(splits * (out.numel() + 2 * rows), dtype=torch.float32)


def add_parts(parts: Tensor, splits: int, out: Tensor, known: Plan) -> None:
    """Write ``out``, the sum of its parts in order."""
    rows, E = out[..., 0].numel(), out.shape[-1]
    config = THOUGHT_DECODE_SUM

    def prepare() -> Launch:
        programs = cdiv(rows, config.blocks["BLOCK_R"])
        return Launch(_add_parts, (programs,), (rows, splits), {"E": E, "BLOCK_E": 1 << (E - 1).bit_length()})

    known.launch("parts", config, (parts, out), prepare)


@triton.jit(
    do_not_specialize=["B", "G", "together", "HG", "L", "thoughts", "window"],
    do_not_specialize_on_alignment=["sinks", "lo", "table", "tree", "step"],
)
def _decode(
    q, k_text, v_text, k_full, v_full, k_own, v_own, sinks, lo, table, tree, step, out, parts, strides,
    B, G, together, HG, L, thoughts, window, scale, softcap, tile,
):  # fmt: skip
    stride_q, stride_k, stride_v, own_k, own_v = strides
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_EDGE: tl.constexpr = tile.BLOCK_EDGE
    pair, turn = taking_turns(B * G, together)
    b, g = pair // G, pair % G
    split, splits = tl.program_id(1), tl.num_programs(1)
    flat = (tl.num_programs(0) // (B * G) - 1 - turn) * BLOCK_M  # tiles that see the most text come first
    thought, head, inside = tile_rows(flat, 0, thoughts, HG, BLOCK_M)
    q += far(b, stride_q.b) + far(g * HG, stride_q.h)
    k_own += far(b, own_k.b) + far(g, own_k.h)
    v_own += far(b, own_v.b) + far(g, own_v.h)

    now = tl.load(step).to(tl.int32)
    table += far(b, thoughts) * 3
    branch = table + far(thought, 3)
    anchor = tl.load(branch, mask=inside, other=-1)
    live = tl.load(branch + 2, mask=inside, other=0)
    on = (anchor >= 0) & (now < live)
    last = tl.where(on, anchor, -1)
    own_first = now * 0 if window is None else tl.maximum(now + 1 - window, 0)
    row = now  # of the thought; in a tree of its path
    if tree is not None:
        tree += far(b, thoughts) * 4
        row = now + tl.load(tree + far(thought, 4), mask=inside, other=0)

    offsets = far(head, stride_q.h) + far(thought, stride_q.m)
    queries = load_tile(q, offsets, inside, tile.K, tile.BLOCK_K)  # [BLOCK_M, BLOCK_K]
    factor = scale * LOG2_E if softcap is None else LOG2_E
    if sinks is None:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        sink = tl.load(sinks + g * HG + head, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        sink = tl.where(split == 0, sink, -float("inf"))
        top = tl.where(sink < LOWEST, LOWEST, sink)
        total = tl.exp2(sink - top)

    lo += far(b, L)
    first = tl.load(lo + last, mask=on, other=0)
    limits = bounds(first, last, on)
    if window is not None:
        oldest = last - first + row + 2 - window  # position id
        limits = window_bounds(limits, oldest, on, lo, tl.arange(0, 1024))
    start, all_from, all_to, final = limits
    part = tl.cdiv(tl.cdiv(tl.maximum(final + 1 - start, 0), splits), BLOCK_N) * BLOCK_N
    start += split * part
    final = tl.minimum(final, start + part - 1)
    last = tl.minimum(last, final)
    text = cover(Limits(start, tl.minimum(all_from, final + 1), tl.minimum(all_to, final), final), tile)
    own = tl.where((split == 0) & (tl.max(last, 0) >= 0), now + 1 - own_first, 0)  # of each thought, in the first part
    k_text += far(b, stride_k.b) + far(g, stride_k.h)
    v_text += far(b, stride_v.b) + far(g, stride_v.h)
    acc = tl.zeros([BLOCK_M, tile.BLOCK_E], tl.float32)
    i = tl.arange(0, BLOCK_EDGE)
    # The own rows of the tile's thoughts make one sequence of keys, thought after thought.
    first_thought = flat // HG
    own_keys = tl.maximum(tl.max(tl.where(on, thought, -1), 0) + 1 - first_thought, 0) * own
    for j in tl.range(tl.cdiv(own_keys, BLOCK_EDGE)):
        n = j * BLOCK_EDGE + i
        of, at = divide(j * BLOCK_EDGE, i, tl.maximum(own, 1))
        of, at = (first_thought + of).to(tl.int64), (own_first + at).to(tl.int64)
        keys = load_tile(k_own, of * own_k.c + at * own_k.m, n < own_keys, tile.K, tile.BLOCK_K)  # [BLOCK_EDGE, BLOCK_K]
        values = load_tile(v_own, of * own_v.c + at * own_v.m, n < own_keys, tile.E, tile.BLOCK_E)  # [BLOCK_EDGE, BLOCK_E]
        values, poison = without_poison(values)
        s = scores(queries, keys, scale, softcap, tile.SLICES, tile.PRECISION)  # [BLOCK_M, BLOCK_EDGE]
        seen = in_range(n[None, :], ((thought - first_thought) * own)[:, None], own)
        s = tl.where(seen, s + poison[None, :], -float("inf"))
        top, total, acc = softmax_step(s, values, factor, top, total, acc, tile.PRECISION)

    if tree is not None:
        # All rows of the nodes above: those before the last of the tile, and from its first thought on those it goes on from.
        below = tl.load(branch + 1, mask=inside, other=0)
        lowest = tl.min(tl.where(on, row, FAR), 0)
        node = tl.where(split == 0, tl.max(tl.where(on, thought, -1), 0), -1)
        while node >= 0:
            rows = tl.load(table + far(node, 3) + 2)
            after = tl.load(table + far(node, 3) + 1) + rows
            depth = tl.load(tree + far(node, 4))
            others = tl.load(tree + far(node, 4) + 1) - after  # rows of nodes below it
            begin = depth * 0 if window is None else tl.maximum(lowest + 1 - window - depth, 0)
            for j in tl.range(tl.cdiv(tl.where(others > 0, rows - begin, 0), BLOCK_EDGE)):
                n = begin + j * BLOCK_EDGE + i
                keys = load_tile(k_own + far(node, own_k.c), far(n, own_k.m), n < rows, tile.K, tile.BLOCK_K)
                values = load_tile(v_own + far(node, own_v.c), far(n, own_v.m), n < rows, tile.E, tile.BLOCK_E)
                values, poison = without_poison(values)
                s = scores(queries, keys, scale, softcap, tile.SLICES, tile.PRECISION)  # [BLOCK_M, BLOCK_EDGE]
                seen = (on & in_range(below, after, others))[:, None] & (n < rows)[None, :]
                if window is not None:
                    seen &= (n + depth)[None, :] > (row - window)[:, None]
                s = tl.where(seen, s + poison[None, :], -float("inf"))
                top, total, acc = softmax_step(s, values, factor, top, total, acc, tile.PRECISION)
            node = tl.where(node > first_thought, node - 1, tl.load(tree + far(node, 4) + 3))

    # Without this step, ptxas makes each product of some variants wait for the one before (C7515).
    acc = tl.where(on[:, None], acc, 0.0)
    count = tl.maximum(last - first + 1, 0)
    for j in tl.range(text.edges):
        n0 = edge_block(j, text, tile)
        n = n0 + i
        # By pointer: these blocks are few, and a descriptor takes a microsecond of host time.
        keys = load_tile(k_text + far(n0, stride_k.m), i * stride_k.m, n <= final, tile.K, tile.BLOCK_K)
        values = load_tile(v_text + far(n0, stride_v.m), i * stride_v.m, n <= final, tile.E, tile.BLOCK_E)
        values, poison = without_poison(values)
        s = scores(queries, keys, scale, softcap, tile.SLICES, tile.PRECISION)  # [BLOCK_M, BLOCK_EDGE]
        seen = in_range(n[None, :], first[:, None], count[:, None])
        if window is not None:
            seen &= (n - tl.load(lo + n, mask=n <= final, other=0))[None, :] >= oldest[:, None]
        s = tl.where(seen, s + poison[None, :], -float("inf"))
        top, total, acc = softmax_step(s, values, factor, top, total, acc, tile.PRECISION)

    for j in tl.range(text.full):
        n0 = text.start + text.before * BLOCK_EDGE + j * BLOCK_N
        keys = load_rows(k_full, k_text, b, g, n0, stride_k.m, final + 1, BLOCK_N, tile.K, tile.BLOCK_K)
        values = load_rows(v_full, v_text, b, g, n0, stride_v.m, final + 1, BLOCK_N, tile.E, tile.BLOCK_E)
        s = scores(queries, keys, scale, softcap, tile.SLICES, tile.PRECISION)  # [BLOCK_M, BLOCK_N]
        top, total, acc = softmax_step(s, values, factor, top, total, acc, tile.PRECISION)

    acc = tl.where(on[:, None], acc, 0.0)
    total = tl.where(on, total + tl.sum(acc * 0.0, 1), 1.0)  # where an infinity was seen, all of the row becomes NaN
    zero = tl.minimum(L, 0)  # where the result goes is computed again: see tile_rows_again
    pair, turn = taking_turns(B * G + zero, together)
    flat = (tl.num_programs(0) // (B * G + zero) - 1 - turn) * BLOCK_M
    thought, head, inside = tile_rows_again(zero, flat, 0, thoughts, HG, BLOCK_M)
    row = head * thoughts + thought
    pair_row = far(split * B * G + pair, HG * thoughts)
    if splits == 1:
        store_tile(out + pair_row * tile.E, far(row, tile.E), inside, acc / total[:, None], tile.E, tile.BLOCK_E)
    else:
        store_tile(parts + pair_row * tile.E, far(row, tile.E), inside, acc, tile.E, tile.BLOCK_E)
        rows = far(splits * B * G, HG * thoughts)
        parts += rows * tile.E + pair_row
        tl.store(parts + row, tl.where(on, top, 0.0), mask=inside)
        tl.store(parts + rows + row, total, mask=inside)


@triton.jit
def far(index, stride):
    """How far ``index`` is along a dimension, in int64."""
    return index.to(tl.int64) * stride


@triton.jit(do_not_specialize=["rows", "splits"])
def _add_parts(parts, out, rows, splits, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    all_rows = splits.to(tl.int64) * rows
    tops = parts + all_rows * E
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for _ in tl.range(splits):
        part_top = tl.load(tops + row, mask=inside, other=0.0)
        part_total = tl.load(tops + all_rows + row, mask=inside, other=1.0)
        part = load_tile(parts, row * E, inside, E, BLOCK_E)
        new_top = tl.maximum(top, part_top)
        decay, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + part_total * weight
        top = new_top
        tops += rows
        parts += rows.to(tl.int64) * E
    store_tile(out, row * E, inside, acc / total[:, None], E, BLOCK_E)
