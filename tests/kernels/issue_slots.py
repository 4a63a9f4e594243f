"""What a forward tile of thought_attention takes on an H100 or H200, by count: clocks of the matrix unit and issue slots.

A multiprocessor starts four warp instructions a clock and does 4096 bf16 operations. Whichever a kernel has more of bounds it,
if the rest is hidden. The counts are read from machine code by ``test_ahead_of_time.py`` for heads of 128, sm_90, Triton 3.6.0:
a model of what a change is worth, to be judged by a GPU, and no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quietstar_kernels import ThoughtLayout
from quietstar_kernels.triton._attention_plan import cdiv, flat_rows, forward_plan

MATRIX = 4096  # operations a clock
SLOTS = 4  # warp instructions a clock


@dataclass(frozen=True)
class Counts:
    """Instructions of one warp: of a tile but for its loops, and of one iteration of each loop."""

    warps: int
    fixed: int
    own: int
    edge: int
    full: int


# Own rows in 3D products of 16 x 16, as it was until 2026-11-21.
BEFORE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_EDGE": 32}, Counts(8, 2678, 986, 478, 554)
LONG = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_EDGE": 64}, Counts(8, 2360, 534, 534, 487)
SHORT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_EDGE": 32}, Counts(4, 2371, 337, 337, 335)
SLOW = 0.62  # of the matrix unit, for the products of 16 x 16


def clocks(layout: ThoughtLayout, group: int, tiles: tuple[dict[str, int], Counts], width: int = 128) -> tuple[float, float]:
    """(issue, matrix) clocks of the thought rows of one key head."""
    blocks, counts = tiles
    plan = forward_plan(layout, group, blocks, query_rows="thoughts")
    own, own_keys = plan.own, blocks["BLOCK_EDGE"] * plan.own
    if tiles is BEFORE:
        row, _ = flat_rows(layout.R, group, blocks["BLOCK_M"], layout.device)
        chunks = row.unflatten(1, (-1, 16))
        own = cdiv(chunks[..., -1] + 1 - chunks[..., 0] // layout.S * layout.S, 16).amax(-1).expand_as(plan.own)
        own_keys = own * 16 / SLOW
    keys = own_keys + blocks["BLOCK_N"] * plan.full + blocks["BLOCK_EDGE"] * plan.edge
    instructions = counts.fixed + counts.own * own + counts.edge * plan.edge + counts.full * plan.full
    return (
        float(instructions.sum() * counts.warps / SLOTS),
        float(torch.as_tensor(keys).sum() * 4 * blocks["BLOCK_M"] * width / MATRIX),
    )


def share_of_peak(layout: ThoughtLayout, group: int, tiles: tuple[dict[str, int], Counts]) -> float:
    """Useful operations over those that the matrix unit could do in the modelled time, if all else is hidden."""
    L, rows = layout.L, layout.N * layout.S
    useful = group * rows * L * (L + layout.S + 2) * 2 * 128
    return useful / MATRIX / max(clocks(layout, group, tiles))
