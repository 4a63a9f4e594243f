"""Cuts the query rows of a layout into chunks of rows that see about the same text, each with a small additive mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout

# PyTorch's CPU flash attention uses its largest tile, 256 rows, from 768 rows on. More rows would only waste arithmetic: every
# row of a chunk is computed against all text that any of them sees. So it matters as much that anchors are few.
THOUGHT_ROWS, TEXT_ROWS, ANCHORS = 768, 256, 128


@dataclass(frozen=True)
class Chunk:
    """Consecutive query rows: c thoughts of s rows each, or c text rows with s = 1.

    Attributes:
        rows: where they are in the query tensor.
        s: rows of each thought.
        thoughts: their thoughts, as p*N + n; None for text rows.
        keys: the text that at least one row sees; may be empty.
        mask: additive, 0 or -inf, [B or 1,1,h*c*s,keys]; None if ``keys`` is empty.
        blind: bool [B or 1,1,1,c,s], rows that see no text although others do; None if there are none.
    """

    rows: slice
    s: int
    thoughts: slice | None
    keys: slice
    mask: Tensor | None = None
    blind: Tensor | None = None


def split(x: Tensor, heads: int, s: int) -> Tensor:
    """A view of the rows x [B,H,c*s,...] as [B,heads,H/heads,c,s,...]."""
    return x.unflatten(1, (heads, -1)).unflatten(3, (-1, s))


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, since the rounding of matmuls depends on strides and alignment."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def by_thought(x: Tensor) -> Tensor:
    """[B,G,h,c,s,...] as a batch of thoughts [B*G*c,h*s,...]."""
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_thought(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``by_thought``; ``shape`` starts with B,G,h,c,s."""
    B, G, h, c, s = shape[:5]
    return x.unflatten(0, (B, G, c)).unflatten(3, (h, s)).transpose(2, 3)


def chunks(layout: ThoughtLayout, rows: int, window: int | None, heads: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """The ``rows`` query rows of ``thought_attention``; masks repeat for each of ``heads`` h."""
    text_rows = rows - layout.R
    if text_rows:
        t = torch.arange(layout.L, device=layout.device).expand(layout.B, -1)
        for cut, *keys in _chunks(layout, t, t[0, :1] * 0, 1, window, heads, dtype, -(-TEXT_ROWS // heads)):
            yield Chunk(cut, 1, None, *keys)
    ahead = torch.arange(1, layout.S + 1, device=layout.device)
    places = min(ANCHORS, -(-THOUGHT_ROWS // (layout.N * layout.S * heads)))
    yield from _thought_chunks(layout, ahead, window, heads, dtype, places, text_rows)


def step_chunks(layout: ThoughtLayout, step: int, window: int | None, heads: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """Row ``step`` of every thought, the query rows of ``thought_decode``."""
    ahead = torch.tensor([1 + step], device=layout.device)
    yield from _thought_chunks(layout, ahead, window, heads, dtype, -(-THOUGHT_ROWS // (layout.N * heads)), 0)


def _thought_chunks(
    layout: ThoughtLayout,
    ahead: Tensor,
    window: int | None,
    heads: int,
    dtype: torch.dtype,
    places: int,
    start: int,
) -> Iterator[Chunk]:
    dead = (layout.anchor < 0) | (layout.length == 0).all(-1)
    t, s = layout.anchor.long().masked_fill(dead, -1), ahead.numel()
    for cut, *text in _chunks(layout, t, ahead, layout.N, window, heads, dtype, places):
        thoughts = slice(cut.start * layout.N, cut.stop * layout.N)
        yield Chunk(slice(start + thoughts.start * s, start + thoughts.stop * s), s, thoughts, *text)


def _chunks(
    layout: ThoughtLayout,
    t: Tensor,
    ahead: Tensor,
    copies: int,
    window: int | None,
    heads: int,
    dtype: torch.dtype,
    places: int,
) -> Iterator[tuple]:
    """Slices of about ``places`` columns of t [B,P], each with keys, mask and blind rows.

    A column has ``copies`` times len(ahead) rows, at position ids pos[t] + ahead; t = -1 sees nothing.
    """
    lo, pos, P = layout.lo.long(), layout.text_position_ids(), t.shape[1]
    if torch.equal(lo, lo[:1].expand_as(lo)) and torch.equal(t, t[:1].expand_as(t)):
        t, lo, pos = t[:1], lo[:1], pos[:1]  # one mask serves the whole batch
    nothing = (slice(0, 0), None, None)
    count = min(P, max(1, P // places))
    for i in range(count):
        cut = slice(i * P // count, (i + 1) * P // count)
        last = t[:, cut, None]
        stop = int(last.max()) + 1
        if stop == 0:
            yield cut, *nothing
            continue
        at = last[..., 0].clamp(min=0)
        first = lo.gather(1, at).masked_fill(last[..., 0] < 0, stop)[..., None]
        start = int(first.min())
        if window is not None:
            oldest = pos.gather(1, at)[..., None] + ahead - window
            # A mask over all text before the window would make the time quadratic in L.
            within = (pos[:, start:stop] > oldest.amin((1, 2))[:, None]).any(0).nonzero()
            start = start + int(within[0]) if within.numel() else stop - 1
        j = torch.arange(start, stop, device=t.device)
        see = ((j >= first) & (j <= last))[:, None, :, None, None]  # [B,1,P,copies,ahead,keys]
        blind = None
        if window is not None:
            see = see & (pos[:, None, None, start:stop] > oldest[..., None])[:, None, :, None]
            used = see.flatten(0, -2).any(0).nonzero()
            if not used.numel():
                yield cut, *nothing
                continue
            see, start = see[..., int(used[0]) :], start + int(used[0])
            blind = ~see.any(-1).expand(-1, -1, -1, copies, -1).flatten(2, 3)[:, :, None]
        mask = torch.where(see, 0.0, -math.inf).to(dtype)
        mask = mask.expand(-1, heads, -1, copies, ahead.numel(), -1).reshape(len(t), 1, -1, stop - start)
        yield cut, slice(start, stop), mask, blind
