"""Cuts the query rows of a layout into chunks of rows that see about the same text, each with a small additive mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar_kernels.branches import ANCHOR, LENGTH, Branches

# PyTorch's CPU flash attention uses its largest tile, 256 rows, from 768 rows on. More rows would only waste arithmetic: every
# row of a chunk is computed against all text that any of them sees.
OWN_ROWS, TEXT_ROWS = 768, 256


@dataclass(frozen=True)
class Chunk:
    """Consecutive query rows, all of branches or all of text; c rows.

    Attributes:
        rows: where they are in the query tensor.
        own: where they are among the branch rows; None for text rows.
        keys: the text that at least one row sees; may be empty.
        mask: additive, 0 or -inf, [B or 1,1,h*c,keys]; None if ``keys`` is empty.
        blind: bool [B or 1,1,1,c], rows that see no text although others do; None if there are none.
    """

    rows: slice
    own: slice | None
    keys: slice
    mask: Tensor | None = None
    blind: Tensor | None = None


def split(x: Tensor, heads: int) -> Tensor:
    """A view of the rows x [B,H,c,...] as [B,heads,H/heads,c,...]."""
    return x.unflatten(1, (heads, -1))


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, since the rounding of matmuls depends on strides and alignment."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def chunks(branches: Branches, rows: int, window: int | None, heads: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """The ``rows`` query rows of ``thought_attention``; masks repeat for each of ``heads`` h."""
    text_rows, lo = rows - branches.R, branches.lo
    if text_rows:
        t = torch.arange(branches.L, device=lo.device).expand(branches.B, -1)
        for cut, *keys in _chunks(lo, t, t - lo, window, heads, dtype, TEXT_ROWS):
            yield Chunk(cut, None, *keys)
    t = branches.column(ANCHOR).masked_fill(~branches.live(), -1)
    position = branches.position_ids()[:, branches.L :]
    for cut, *keys in _chunks(lo, t, position, window, heads, dtype, OWN_ROWS):
        yield Chunk(slice(text_rows + cut.start, text_rows + cut.stop), cut, *keys)


def step_chunks(lo: Tensor, table: Tensor, step: int, window: int | None, heads: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """Row ``step`` of every branch, the query rows of ``thought_decode``."""
    t = table[..., ANCHOR].long().masked_fill(table[..., LENGTH] <= step, -1)
    at = t.clamp(min=0)
    position = at - lo.long().gather(1, at) + 1 + step if lo.shape[1] else t
    for cut, *keys in _chunks(lo, t, position, window, heads, dtype, OWN_ROWS):
        yield Chunk(cut, cut, *keys)


def _chunks(
    lo: Tensor, t: Tensor, position: Tensor, window: int | None, heads: int, dtype: torch.dtype, most: int
) -> Iterator[tuple]:
    """Slices of rows, about ``most`` with those of all heads, each with keys, mask and blind rows.

    Rows are at text positions t [B,rows], -1 if they see nothing, and have position ids ``position`` [B,rows].
    """
    lo, rows = lo.long(), t.shape[1]
    text_position = torch.arange(lo.shape[1], device=lo.device) - lo
    if all(torch.equal(x, x[:1].expand_as(x)) for x in (lo, t)):  # one mask serves the whole batch
        t, lo, position, text_position = t[:1], lo[:1], position[:1], text_position[:1]
    nothing = (slice(0, 0), None, None)
    count = min(rows, max(1, rows * heads // most))
    for i in range(count):
        cut = slice(i * rows // count, (i + 1) * rows // count)
        last = t[:, cut, None]
        stop = int(last.max()) + 1
        if stop == 0:
            yield cut, *nothing
            continue
        at = last[..., 0].clamp(min=0)
        first = lo.gather(1, at).masked_fill(last[..., 0] < 0, stop)[..., None]
        start = int(first.min())
        if window is not None:
            oldest = position[:, cut] - window
            # A mask over all text before the window would make the time quadratic in L.
            oldest_of_all = oldest.masked_fill(last[..., 0] < 0, stop).amin(1)
            within = (text_position[:, start:stop] > oldest_of_all[:, None]).any(0).nonzero()
            start = start + int(within[0]) if within.numel() else stop - 1
        j = torch.arange(start, stop, device=t.device)
        see = (j >= first) & (j <= last)  # [B,rows,keys]
        blind = None
        if window is not None:
            see = see & (text_position[:, None, start:stop] > oldest[..., None])
            used = see.flatten(0, -2).any(0).nonzero()
            if not used.numel():
                yield cut, *nothing
                continue
            see, start = see[..., int(used[0]) :], start + int(used[0])
            blind = ~see.any(-1)[:, None, None]
        mask = torch.where(see, 0.0, -math.inf).to(dtype)
        mask = mask[:, None].expand(-1, heads, -1, -1).reshape(len(t), 1, -1, stop - start)
        yield cut, slice(start, stop), mask, blind
