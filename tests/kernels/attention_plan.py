"""The blocks that ``attention_forward`` loops over, computed on the host from the layout, to count its arithmetic.

This repeats, in tensors over all tiles, what the kernel computes for one tile. A test counts the products that really run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._rows import FAR


@dataclass(frozen=True)
class ForwardPlan:
    """Blocks per tile, int64 [B,tiles], for each key head; thought tiles first, then text tiles.

    Attributes:
        blocks: the tile sizes, as in ``configs.ATTENTION_FORWARD``.
        own: masked blocks of BLOCK_EDGE own keys.
        full: blocks of BLOCK_N text keys.
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
    parts = [_thought_tiles(layout, group, blocks, window)]
    if query_rows == "all":
        parts.append(_text_tiles(layout, group, blocks, window))
    own, full, edge = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return ForwardPlan(blocks, own, full, edge)


def _thought_tiles(layout: ThoughtLayout, group: int, blocks: dict[str, int], window: int | None) -> tuple[Tensor, ...]:
    """Blocks of own keys, whole and masked blocks of text: [B,tiles] each."""
    row, inside = flat_rows(layout.R, group, blocks["BLOCK_M"], layout.device)
    on = layout.live().flatten(1)[:, row] & inside
    s = row % layout.S
    full, edge = text_blocks(layout, layout.row_anchor()[:, row], 1 + s, on, blocks, window)
    first = row - (s if window is None else s.clamp(max=window - 1))
    start, last = torch.where(on, first, layout.R).amin(-1), torch.where(on, row, -1).amax(-1)
    return cdiv((last + 1 - start).clamp(min=0), blocks["BLOCK_EDGE"]), full, edge


def _text_tiles(layout: ThoughtLayout, group: int, blocks: dict[str, int], window: int | None) -> tuple[Tensor, ...]:
    row, inside = flat_rows(layout.L, group, blocks["BLOCK_M"], layout.device)
    t = row.expand(layout.B, *row.shape)
    full, edge = text_blocks(layout, t, torch.zeros_like(row), inside.expand_as(t), blocks, window)
    return torch.zeros_like(full), full, edge


def flat_rows(count: int, group: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[tiles,BLOCK_M]: the rows of the flat rows (the last row if there is none), and whether there is one."""
    row = torch.arange(cdiv(count * group, block) * block, device=device).view(-1, block) // group
    return row.clamp(max=max(count - 1, 0)), row < count


def text_blocks(
    layout: ThoughtLayout, t: Tensor, ahead: Tensor, on: Tensor, blocks: dict[str, int], window: int | None
) -> tuple[Tensor, Tensor]:
    """Whole and masked blocks [B,tiles] for rows [B,tiles,BLOCK_M] at position ids pos[t] + ahead that see lo[t]..t."""
    far = FAR.value
    first = layout.lo.long().gather(1, t.flatten(1)).view(t.shape)
    start = torch.where(on, first, far).amin(-1)
    all_from = torch.where(on, first, 0).amax(-1)
    all_to = torch.where(on, t, far).amin(-1)
    end = torch.where(on, t, -1).amax(-1)
    if window is not None:
        oldest = t - first + ahead + 1 - window
        lowest, highest = torch.where(on, oldest, far).amin(-1), torch.where(on, oldest, -far).amax(-1)
        begin = torch.maximum(start, lowest)
        n = torch.arange(layout.L, device=t.device)
        position = layout.text_position_ids()[:, None]
        there = (n >= begin[..., None]) & (n <= end[..., None])
        start = torch.where(there & (position >= lowest[..., None]), n, far).amin(-1)
        too_old = torch.where(there & (position < highest[..., None]), n + 1, 0).amax(-1)
        all_from = torch.maximum(torch.maximum(all_from, begin), too_old)
    before = cdiv((all_from - start).clamp(min=0), blocks["BLOCK_EDGE"])
    full_start = start + before * blocks["BLOCK_EDGE"]
    full = (all_to + 1 - full_start).clamp(min=0) // blocks["BLOCK_N"]
    after = cdiv((end + 1 - full_start - full * blocks["BLOCK_N"]).clamp(min=0), blocks["BLOCK_EDGE"])
    return full, before + after


def cdiv(a, b: int):
    """a / b rounded up, of integers or tensors of them."""
    return -(-a // b)
