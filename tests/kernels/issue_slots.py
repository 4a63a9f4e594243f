"""The clocks that the kernels of thought_attention and thought_decode should take on an H100 or H200: a model to judge changes
without a GPU, not a measurement.

A program takes clocks of three units of a multiprocessor: its warps issue instructions, four per clock; there are matrix
products; and data goes through shared memory. The unit with the most clocks bounds the kernel, if the others overlap with it.
The counts are read from machine code (``machine_code.py``) for bf16 heads of 128 on sm_90, Triton 3.6.0, and
``test_ahead_of_time.py`` compares them with compiled kernels. How often a loop runs is counted from a layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from attention_backward_plan import own_key_tiles, text_key_tiles
from attention_plan import cdiv, flat_rows, forward_plan, text_blocks
from machine_code import MATRIX
from torch import Tensor

from quietstar_kernels import ThoughtLayout

WIDTH = 128  # of keys and values
MEMORY = 4.8e12 / 1.755e9 / 132  # bytes a clock for each multiprocessor of an H200


class Loop(NamedTuple):
    """One iteration takes this many instructions of a warp, and clocks of the matrix unit and shared memory for all warps."""

    instructions: int
    matrix: int
    shared: int


class Code(NamedTuple):
    """A kernel; ``fixed`` counts the instructions of a warp outside its loops."""

    blocks: dict[str, int]
    warps: int
    fixed: int
    loops: tuple[Loop, ...]


class Clocks(NamedTuple):
    """The sums over all programs of a launch."""

    issue: float
    matrix: float
    shared: float


def rows(m: int, n: int, edge: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_EDGE": edge}


FORWARD = Code(rows(128, 128, 64), 8, 2411, (Loop(535, 1024, 1024), Loop(487, 2048, 1792)))
FORWARD_SHORT = Code(rows(64, 64, 32), 4, 2403, (Loop(337, 256, 384), Loop(335, 512, 640)))
QUERIES = Code(rows(128, 64, 32), 8, 1809, (Loop(397, 768, 1240), Loop(326, 1536, 1560)))
TEXT_KEYS = Code({"BLOCK_N": 128, "BLOCK_M": 32}, 8, 1342, (Loop(477, 1024, 1560),))
OWN_KEYS = Code({"BLOCK_N": 32, "BLOCK_M": 32}, 4, 1005, (Loop(410, 413, 1032),))
DECODE_SHORT = Code(rows(64, 64, 32), 4, 2824, (Loop(690, 256, 588), Loop(516, 256, 588), Loop(336, 512, 640)))
DECODE = Code(rows(128, 64, 32), 8, 2609, (Loop(526, 512, 888), Loop(438, 512, 888), Loop(336, 1024, 1024)))

SHIPPED = {  # by kernel and warps
    ("attention_forward", 8): FORWARD,
    ("attention_forward", 4): FORWARD_SHORT,
    ("attention_backward_queries", 8): QUERIES,
    ("attention_backward_text_keys", 8): TEXT_KEYS,
    ("attention_backward_own_keys", 4): OWN_KEYS,
    ("_decode", 8): DECODE,
    ("_decode", 4): DECODE_SHORT,
}

# The kernels until 2026-11-21: own rows in products of 16 x 16, and a separate loop for text at the edges. Products waited for
# each other and loops for their copies, which the model doesn't include.
OLD_FORWARD = Code(rows(128, 128, 32), 8, 2651, (Loop(986, 413, 1184), Loop(478, 512, 888), Loop(554, 2048, 1808)))
OLD_QUERIES = Code(rows(128, 64, 32), 8, 1785, (Loop(396, 768, 1240), Loop(324, 1536, 1560)))
OLD_TEXT_KEYS = Code({"BLOCK_N": 128, "BLOCK_M": 32}, 8, 1522, (Loop(651, 1024, 1560),))
OLD_OWN_KEYS = Code({"BLOCK_N": 32, "BLOCK_M": 32}, 4, 958, (Loop(488, 413, 1032),))
OLD_DECODE = Code(rows(128, 64, 32), 8, 2387, (Loop(1334, 413, 1184), Loop(478, 512, 880), Loop(375, 1024, 1032)))


def clocks(code: Code, *runs: Tensor) -> Clocks:
    """The clocks if loop i of each program runs runs[i] times."""
    times = [float(x.sum()) for x in runs]
    issue, matrix, shared = (sum(n * loop[unit] for n, loop in zip(times, code.loops, strict=True)) for unit in range(3))
    return Clocks((code.fixed * runs[0].numel() + issue) * code.warps / 4, matrix, shared)


def query_rows(layout: ThoughtLayout, group: int, code: Code) -> Clocks:
    """The forward or dq, for the thought rows of one key head."""
    plan = forward_plan(layout, group, code.blocks, query_rows="thoughts")
    if len(code.loops) == 2:
        return clocks(code, plan.own + plan.edge, plan.full)
    row, _ = flat_rows(layout.R, group, code.blocks["BLOCK_M"], layout.device)
    chunks = row.unflatten(1, (-1, 16))
    own = cdiv(chunks[..., -1] + 1 - chunks[..., 0] // layout.S * layout.S, 16).amax(-1)
    return clocks(code, own.expand_as(plan.own), plan.edge, plan.full)


def backward(layout: ThoughtLayout, group: int, queries: Code, text_keys: Code, own_keys: Code) -> list[Clocks]:
    """The three kernels with products, in order, if only thought rows have gradients."""
    return [
        query_rows(layout, group, queries),
        clocks(text_keys, group * text_key_tiles(layout, text_keys.blocks, None, "thoughts")),
        clocks(own_keys, group * own_key_tiles(layout, own_keys.blocks)),
    ]


def decode(layout: ThoughtLayout, group: int, step: int, code: Code) -> Clocks:
    """One step of all thoughts, with all anchors in use."""
    thought, inside = flat_rows(layout.P * layout.N, group, code.blocks["BLOCK_M"], layout.device)
    t = layout.anchor.long()[:, thought // layout.N]
    full, edge = text_blocks(layout, t, torch.full_like(thought, step), inside.expand_as(t), code.blocks, None)
    if code is OLD_DECODE:
        chunks = thought.unflatten(1, (-1, 16))
        own = cdiv((chunks[..., -1] + 1 - chunks[..., 0]) * (step + 1), 16).amax(-1)
    else:
        own = cdiv((thought[:, -1] + 1 - thought[:, 0]) * (step + 1), code.blocks["BLOCK_EDGE"])
    return clocks(code, own.expand_as(full), edge, full)


def useful(layout: ThoughtLayout, group: int) -> float:
    """Clocks of the matrix unit for the two products of each score of the thought rows, if every position is an anchor."""
    L = layout.L
    return 2 * 2 * WIDTH * group * layout.N * layout.S * L * (L + layout.S + 2) / 2 / MATRIX


def reading(layout: ThoughtLayout, group: int, step: int) -> float:
    """Clocks of a multiprocessor's share of the memory bandwidth for what a step of decoding must read and write."""
    thoughts = layout.P * layout.N
    return 2 * 2 * WIDTH * (layout.L + thoughts * (step + 1) + thoughts * group) / MEMORY
