"""The blocks that the backward of thought_attention loops over, computed on the host, to count its arithmetic.

``attention_plan`` does the same for the forward. A test counts the products that really run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attention_plan import cdiv, forward_plan
from torch import Tensor

from quietstar_kernels.branches import ANCHOR, LENGTH, START
from quietstar_kernels.layout import ThoughtLayout


@dataclass(frozen=True)
class BackwardPlan:
    """Scores that each kernel computes for one key head, all batch rows together, seen and unseen.

    Attributes:
        queries: for dq, three products each: of widths K (q·k), E (dO·v), K (dS k).
        text_keys: for dk and dv of the text, four products each: K, E, E (p dO), K (dS q).
        own_keys: the same for branch rows.
    """

    queries: int
    text_keys: int
    own_keys: int

    def products(self, K: int, E: int) -> int:
        """Multiplications if dk and dv come from one pass. Wide heads take two, with q·k in each."""
        return self.queries * (2 * K + E) + (self.text_keys + self.own_keys) * (2 * K + 2 * E)


def backward_plan(
    layout: ThoughtLayout,
    group: int,
    queries: dict[str, int],
    text_keys: dict[str, int],
    own_keys: dict[str, int],
    window: int | None = None,
    query_rows: str = "all",
) -> BackwardPlan:
    """For ``group`` H/G query heads per key head and the tile sizes of ``configs.ATTENTION_BACKWARD_*``."""
    return BackwardPlan(
        queries=forward_plan(layout, group, queries, window, query_rows).scores(),  # the same tiles, of other sizes
        text_keys=group * _scores(text_key_tiles(layout, text_keys, window, query_rows), text_keys),
        own_keys=group * _scores(own_key_tiles(layout, own_keys, window), own_keys),
    )


def _scores(tiles: Tensor, blocks: dict[str, int]) -> int:
    return int(tiles.sum()) * blocks["BLOCK_M"] * blocks["BLOCK_N"]


def text_key_tiles(layout: ThoughtLayout, blocks: dict[str, int], window: int | None, query_rows: str) -> Tensor:
    """Row tiles [B,blocks] of each query head that each block of text keys meets."""
    BLOCK_N, BLOCK_M = blocks["BLOCK_N"], blocks["BLOCK_M"]
    t = torch.arange(layout.L, device=layout.device)
    position, table = layout.text_position_ids(), layout.branches.table.long()
    anchor, first, length = (table[..., column] for column in (ANCHOR, START, LENGTH))
    tiles = []
    for start in range(0, layout.L, BLOCK_N):
        sees = (t >= start) & (layout.lo < start + BLOCK_N)
        if window is not None:
            sees &= position - window < position[:, start : start + BLOCK_N].amax(1, keepdim=True)
        end = torch.where(sees, t + 1, start).amax(1, keepdim=True)
        sees = (anchor >= start) & (anchor < end) & (length > 0)
        begin = torch.where(sees, first, layout.R).amin(1) if layout.branches.C else end[:, 0]
        rows = torch.where(sees, first + length, 0).amax(1) - begin if layout.branches.C else 0 * begin
        tiles.append(cdiv(rows.clamp(min=0), BLOCK_M))
        if query_rows == "all":
            tiles[-1] += cdiv(end[:, 0] - start, BLOCK_M)
    return torch.stack(tiles, 1)


def own_key_tiles(layout: ThoughtLayout, blocks: dict[str, int], window: int | None = None) -> Tensor:
    """The same for own keys: the rows of a block are those of its branches that may see one of its live keys."""
    BLOCK_N, R, branches = blocks["BLOCK_N"], layout.R, layout.branches
    padded = lambda x, value: torch.nn.functional.pad(x, (0, -R % BLOCK_N), value=value).unflatten(1, (-1, BLOCK_N))  # noqa: E731
    live = padded(branches.live(), False)
    r = padded(torch.arange(R, device=layout.device).expand(layout.B, R), 0)
    start, length = (padded(branches.column(column), 0) for column in (START, LENGTH))
    begin = torch.where(live, start if branches.full else r, R).amin(-1)
    end = torch.where(live, start + length, 0).amax(-1)
    if window is not None:
        end = torch.minimum(end, torch.where(live, r, 0).amax(-1) + window)
    return cdiv((end - begin).clamp(min=0), blocks["BLOCK_M"])
