"""The own part of ``thought_attention``: the rows of each branch over its own rows, a query head and some branches at a time.

Small matmuls on views of the caller's tensors: at these sizes, copies would take as long as the arithmetic. Branches that are
as long as the one before go with it. A branch that is too long goes by blocks of its rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.branches import LENGTH, START, Branches
from quietstar_kernels.cpu.plain._parts import scores_of
from quietstar_kernels.reference import wide

SCORES = 2**18  # at a time: 1 MB of fp32, which fits a core's cache
FEWEST_ROWS = 32  # of a block, however long the branch


@dataclass(frozen=True)
class Block:
    """Some rows of ``count`` branches under query head h, and the own rows that they may see.

    Attributes:
        first: the first row of the first branch.
        spacing: from a branch to the next.
        rows, keys: of each branch.
        mask: additive, 0 or -inf, [rows,keys]; None if all is seen.
    """

    b: int
    h: int
    g: int
    first: int
    count: int
    spacing: int
    rows: slice
    keys: slice
    mask: Tensor | None

    def rows_of(self, x: Tensor) -> Tensor:
        """A view [count,rows,...] of x [B,H,R,...]."""
        return self._branches(x[self.b, self.h])[:, self.rows]

    def keys_of(self, x: Tensor) -> Tensor:
        """A view [count,keys,...] of x [B,G,R,...]."""
        return self._branches(x[self.b, self.g])[:, self.keys]

    def _branches(self, x: Tensor) -> Tensor:
        return x[self.first : self.first + self.count * self.spacing].unflatten(0, (self.count, self.spacing))


def own_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, branches: Branches, options: AttentionOptions
) -> None:
    """Writes out [B,H,R,E] and lse [B,H,R] of branch rows q [B,H,R,K] over their own k [B,G,R,K], v [B,G,R,E]."""
    for block in _blocks(branches, q.shape[1], k.shape[1], options.window, lse):
        q3, k3, v3 = wide(block.rows_of(q)), wide(block.keys_of(k)), wide(block.keys_of(v))
        scores = scores_of(q3, k3, options)
        if block.mask is not None:
            scores += block.mask
        top = scores.amax(-1, keepdim=True)  # finite: a row sees itself
        p = scores.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        torch.bmm(p.div_(total), v3, out=block.rows_of(out))
        block.rows_of(lse).copy_((top + total.log_())[..., 0])


def own_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    branches: Branches,
    options: AttentionOptions,
) -> None:
    """Adds dq, and dk, dv of the own rows, from the joint ``lse`` and ``delta`` = rowsum(grad_out * joint out)."""
    for block in _blocks(branches, q.shape[1], k.shape[1], options.window, lse):
        g3, q3, k3, v3 = (wide(x) for x in (block.rows_of(grad_out), block.rows_of(q), block.keys_of(k), block.keys_of(v)))
        scores = scores_of(q3, k3, options)
        slope = None if options.softcap is None else 1 - (scores / options.softcap) ** 2
        if block.mask is not None:
            scores += block.mask
        p = scores.sub_(block.rows_of(lse)[..., None]).exp_()
        ds = torch.bmm(g3, v3.transpose(1, 2)).sub_(block.rows_of(delta)[..., None]).mul_(p).mul_(options.scale)
        if slope is not None:
            ds *= slope
        torch.bmm(ds, k3, out=block.rows_of(dq))
        block.keys_of(dk).baddbmm_(ds.transpose(1, 2), q3)
        block.keys_of(dv).baddbmm_(p.transpose(1, 2), g3)


def own_range(branches: Branches, window: int | None) -> tuple[Tensor, Tensor]:
    """The own rows that each row sees, from the first to before the second: int64 [B,R] each, both 0 where the row is off."""
    r = torch.arange(branches.R, device=branches.device)
    first, live = branches.column(START), branches.live()
    end = first + branches.column(LENGTH) if branches.full else torch.where(live, r + 1, 0)
    if window is not None:
        first = torch.where(live, torch.maximum(first, r + 1 - window), 0)
    return first, end


def _blocks(branches: Branches, H: int, G: int, window: int | None, like: Tensor) -> Iterator[Block]:
    runs = [(b, *run) for b, table in enumerate(branches.table.tolist()) for run in _runs(table, branches.full)]
    masks: dict[tuple[int, int, int, int], Tensor | None] = {}
    for (b, first, count, spacing, s), h in itertools.product(runs, range(H)):
        rows = s if s * s <= SCORES else max(FEWEST_ROWS, SCORES // s)
        for begin in range(0, s, rows):
            end = min(begin + rows, s)
            seen = slice(0 if window is None else max(0, begin + 1 - window), s if branches.full else end)
            key = begin, end, seen.start, seen.stop
            if key not in masks:
                masks[key] = _mask(*key, branches.full, window, like)
            step = max(1, SCORES // ((end - begin) * (seen.stop - seen.start)))
            for c in range(0, count, step):
                place = first + c * spacing, min(step, count - c), spacing
                yield Block(b, h, h * G // H, *place, slice(begin, end), seen, masks[key])


def _runs(table: list[list[int]], full: bool) -> Iterator[tuple[int, int, int, int]]:
    """Branches next to each other with equally many rows: (first row, branches, rows from one to the next, rows)."""
    sized = []
    for i, (_, start, length) in enumerate(table):
        spacing = table[i + 1][1] - start if i + 1 < len(table) else length
        # Without ``full``, rows that are off after the live ones change nothing, and don't interrupt a run.
        sized.append((start, spacing, length if full else spacing))
    for (spacing, s), run in itertools.groupby(sized, lambda branch: branch[1:]):
        found = list(run)
        if s:
            yield found[0][0], len(found), spacing, s


def _mask(begin: int, end: int, first: int, stop: int, full: bool, window: int | None, like: Tensor) -> Tensor | None:
    """Additive, of rows begin..end over rows first..stop."""
    s, key = torch.arange(begin, end)[:, None], torch.arange(first, stop)
    seen = torch.ones(end - begin, stop - first, dtype=torch.bool) if full else key <= s
    if window is not None:
        seen = seen & (key > s - window)
    return None if bool(seen.all()) else torch.where(seen, 0.0, -math.inf).to(like)
