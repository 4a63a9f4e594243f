"""Random layouts of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import ThoughtLayout

LAYOUT_KINDS = ("every", "anchors", "left", "right", "both", "documents", "any_lo", "ragged", "no_anchors", "one")
BRANCH_KINDS = ("full", "packed", "packed_full")


def random_layout(
    generator: torch.Generator,
    kind: str | None = None,
    max_batch: int = 3,
    max_text: int = 12,
    max_thoughts: int = 3,
    max_rows: int = 5,
    device: torch.device | str | None = None,
) -> ThoughtLayout:
    """A layout of random sizes, from 1 to the given ones.

    Args:
        generator: on CPU.
        kind: one of ``LAYOUT_KINDS`` or ``BRANCH_KINDS``, by default a random one of the former. "every" position; chosen
            "anchors" with -1 at the end; padding "left", "right" or "both"; packed "documents", some with padding; "any_lo"
            (legal, though no real text has it); "ragged" thoughts; "no_anchors" (P = 0); "one" (all sizes 1). All but "every",
            "no_anchors" and "one" may also have chosen anchors and ragged thoughts. "full" is "ragged" with ``own="full"``;
            "packed" and "packed_full" have several branches of 0 to ``max_rows`` rows on an anchor, unused ones, and rows
            after the last branch.

    Raises:
        ValueError: no such kind.
    """
    if kind is None:
        kind = LAYOUT_KINDS[_integer(generator, 0, len(LAYOUT_KINDS) - 1)]
    if kind not in LAYOUT_KINDS + BRANCH_KINDS:
        raise ValueError(f"random_layout: kind must be one of {', '.join(LAYOUT_KINDS + BRANCH_KINDS)}, got {kind!r}")
    if kind == "one":
        return ThoughtLayout.every_position(1, 1, 1, 1, device)
    B, L, N, S = (_integer(generator, 1, most) for most in (max_batch, max_text, max_thoughts, max_rows))
    if kind in ("packed", "packed_full"):
        layout = _packed(generator, B, L, B * max_thoughts, max_rows, "full" if kind == "packed_full" else "causal")
        return layout if device is None else layout.to(device)
    if kind == "every":
        return ThoughtLayout.every_position(B, L, N, S, device)
    anchors = None
    if kind == "no_anchors":
        anchors = torch.zeros(B, 0, dtype=torch.int32)
    elif kind == "anchors" or _integer(generator, 0, 1):
        anchors = _random_anchors(generator, B, L)
    if kind in ("left", "right", "both"):
        first = _integers(generator, 0, L, B) if kind != "right" else torch.zeros(B, dtype=torch.int64)
        last = _integers(generator, 0, L, B) if kind != "left" else torch.full((B,), L)
        first, last = torch.minimum(first, last), torch.maximum(first, last)
        t = torch.arange(L)
        layout = ThoughtLayout.from_padding((t >= first[:, None]) & (t < last[:, None]), N, S, anchors)
    elif kind == "documents":
        ids = torch.randint(0, 3, (B, L), generator=generator).eq(0).cumsum(1)
        padded = _integers(generator, L // 2, 2 * L, B)
        ids = ids.masked_fill(torch.arange(L) >= padded[:, None], -1)
        layout = ThoughtLayout.from_documents(ids, N, S, anchors)
    elif kind == "any_lo":
        lo = (torch.rand(B, L, generator=generator) * torch.arange(1, L + 1)).long()
        layout = ThoughtLayout.at(torch.arange(L).expand(B, L) if anchors is None else anchors, N, S, lo=lo)
    else:
        layout = ThoughtLayout.at(torch.arange(L).expand(B, L) if anchors is None else anchors, N, S, text_length=L)
    if kind in ("ragged", "full") or _integer(generator, 0, 2) == 0:
        length = torch.minimum(layout.length, torch.randint(0, S + 1, layout.length.shape, generator=generator))
        layout = ThoughtLayout.at(layout.anchor, N, S, lo=layout.lo, length=length, own="full" if kind == "full" else "causal")
    return layout if device is None else layout.to(device)


def _packed(generator: torch.Generator, B: int, L: int, most: int, max_rows: int, own: str) -> ThoughtLayout:
    """Up to ``most`` branches in a batch row, fewer in some, half of the time in packed documents."""
    C = _integer(generator, 0, most)
    off = torch.arange(C) >= _integers(generator, 0, C, B)[:, None]
    anchors = torch.randint(0, L, (B, C), generator=generator).sort(1).values.masked_fill(off, -1)
    lengths = torch.randint(0, max_rows + 1, (B, C), generator=generator).masked_fill(off, 0)
    ids = torch.zeros(B, L, dtype=torch.int64)
    if _integer(generator, 0, 1):
        ids = torch.randint(0, 3, (B, L), generator=generator).eq(0).cumsum(1)
    lo = ThoughtLayout.from_documents(ids, 1, 1).lo
    rows = None if _integer(generator, 0, 1) else int(lengths.sum(1).max()) + _integer(generator, 0, 3)
    return ThoughtLayout.packed(anchors, lengths, lo=lo, rows=rows, own=own)


def _random_anchors(generator: torch.Generator, B: int, L: int) -> Tensor:
    """[B,P]: some positions of each row, ascending, then -1; P is sometimes one more than the longest row needs."""
    chosen = torch.rand(B, L, generator=generator) < torch.rand(B, 1, generator=generator)
    places = int(chosen.sum(1).max()) + _integer(generator, 0, 1)
    anchors = torch.full((B, places), -1)
    for row, positions in zip(anchors, chosen, strict=True):
        row[: int(positions.sum())] = positions.nonzero()[:, 0]
    return anchors


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _integers(generator: torch.Generator, low: int, high: int, count: int) -> Tensor:
    return torch.randint(low, high + 1, (count,), generator=generator)
