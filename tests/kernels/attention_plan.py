"""The blocks that ``attention_forward`` loops over, computed on the host from the layout, to count its arithmetic.

This repeats, in tensors over all tiles, what the kernel computes for one tile. A test counts the products that really run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar_kernels.branches import ANCHOR, LENGTH, START, Branches
from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._rows import FAR


@dataclass(frozen=True)
class ForwardPlan:
    """Blocks per tile, int64 [B,tiles], for each key head; tiles of branches first, then text tiles.

    Attributes:
        blocks: the tile sizes, as in ``configs.ATTENTION_FORWARD``.
        own: masked blocks of BLOCK_EDGE own keys.
        full: blocks of BLOCK_N keys, own ones and text.
        edge: masked blocks of BLOCK_EDGE text keys.
    """

    blocks: dict[str, int]
    own: Tensor
    full: Tensor
    edge: Tensor

    def scores(self) -> int:
        """Scores computed for one key head and all batch rows, seen and unseen."""
        return self.blocks["BLOCK_M"] * int(self.keys().sum())

    def keys(self) -> Tensor:
        """Keys [B,tiles] that the rows of each tile are computed against."""
        return self.blocks["BLOCK_N"] * self.full + self.blocks["BLOCK_EDGE"] * (self.own + self.edge)


def forward_plan(
    layout: ThoughtLayout, group: int, blocks: dict[str, int], window: int | None = None, query_rows: str = "all"
) -> ForwardPlan:
    """The blocks of one launch, for ``group`` H/G query heads per key head and the tile sizes ``blocks``."""
    branches = layout.branches
    parts = [_branch_tiles(branches, group, blocks, window)]
    if query_rows == "all":
        parts.append(_text_tiles(branches, group, blocks, window))
    own, full, edge = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return ForwardPlan(blocks, own, full, edge)


def _branch_tiles(branches: Branches, group: int, blocks: dict[str, int], window: int | None) -> tuple[Tensor, ...]:
    """Masked blocks of own keys, whole blocks, masked blocks of text: [B,tiles] each."""
    row, inside = flat_rows(branches.R, group, blocks["BLOCK_M"], branches.device)
    on = branches.live()[:, row] & inside
    r = torch.arange(branches.R, device=branches.device)
    start = branches.column(START)
    first = start if window is None else torch.maximum(start, r + 1 - window)
    last = start + branches.column(LENGTH) - 1 if branches.full else r.expand_as(start)
    own_full, own = cover(*bounds(first[:, row], last[:, row], on), blocks)
    full, edge = text_blocks(branches, branches.column(ANCHOR)[:, row], (1 + r - start)[:, row], on, blocks, window)
    return own, own_full + full, edge


def _text_tiles(branches: Branches, group: int, blocks: dict[str, int], window: int | None) -> tuple[Tensor, ...]:
    row, inside = flat_rows(branches.L, group, blocks["BLOCK_M"], branches.device)
    t = row.expand(branches.B, *row.shape)
    full, edge = text_blocks(branches, t, torch.zeros_like(row), inside.expand_as(t), blocks, window)
    return torch.zeros_like(full), full, edge


def flat_rows(count: int, group: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[tiles,BLOCK_M]: the rows of the flat rows (the last row if there is none), and whether there is one."""
    row = torch.arange(cdiv(count * group, block) * block, device=device).view(-1, block) // group
    return row.clamp(max=max(count - 1, 0)), row < count


def text_blocks(
    layout: Branches | ThoughtLayout, t: Tensor, ahead: Tensor, on: Tensor, blocks: dict[str, int], window: int | None
) -> tuple[Tensor, Tensor]:
    """Whole and masked blocks [B,tiles] for rows [B,tiles,BLOCK_M] at position ids pos[t] + ahead that see lo[t]..t."""
    first = layout.lo.long().gather(1, t.flatten(1)).view(t.shape)
    start, all_from, all_to, end = bounds(first, t, on)
    if window is not None:
        oldest = t - first + ahead + 1 - window
        lowest, highest = torch.where(on, oldest, FAR.value).amin(-1), torch.where(on, oldest, -FAR.value).amax(-1)
        begin = torch.maximum(start, lowest)
        n = torch.arange(layout.L, device=t.device)
        position = layout.text_position_ids()[:, None]
        there = (n >= begin[..., None]) & (n <= end[..., None])
        start = torch.where(there & (position >= lowest[..., None]), n, FAR.value).amin(-1)
        too_old = torch.where(there & (position < highest[..., None]), n + 1, 0).amax(-1)
        all_from = torch.maximum(torch.maximum(all_from, begin), too_old)
    return cover(start, all_from, all_to, end, blocks)


def bounds(first: Tensor, last: Tensor, on: Tensor) -> tuple[Tensor, ...]:
    """As ``_rows.bounds``, of rows [B,tiles,BLOCK_M] that all see something."""
    far = FAR.value
    return (
        torch.where(on, first, far).amin(-1),
        torch.where(on, first, 0).amax(-1),
        torch.where(on, last, far).amin(-1),
        torch.where(on, last, -1).amax(-1),
    )


def cover(start: Tensor, all_from: Tensor, all_to: Tensor, end: Tensor, blocks: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Whole and masked blocks [B,tiles]."""
    before = cdiv((all_from - start).clamp(min=0), blocks["BLOCK_EDGE"])
    full_start = start + before * blocks["BLOCK_EDGE"]
    full = (all_to + 1 - full_start).clamp(min=0) // blocks["BLOCK_N"]
    after = cdiv((end + 1 - full_start - full * blocks["BLOCK_N"]).clamp(min=0), blocks["BLOCK_EDGE"])
    return full, before + after


def cdiv(a, b: int):
    """a / b rounded up, of integers or tensors of them."""
    return -(-a // b)
