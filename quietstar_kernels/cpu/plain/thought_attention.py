"""thought_attention on CPUs: the own part of all branches first, then the text by flash attention, a chunk of rows at a time.

The c rows of a chunk are viewed as [B,G,h,c,K]: h query heads share a key head. To the text part (h,c) are rows, so that keys
are never repeated. The own part is computed by small matmuls on views of the caller's tensors, for a query head and some
branches of equal length at a time: at these sizes, copies would take as long as the arithmetic.

Everything is fp32 (fp64 for fp64 inputs): PyTorch's half-precision flash attention is no faster on CPUs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._options import AttentionOptions
from ...branches import LENGTH, START, Branches
from ...reference import wide
from ._text import (
    add_sinks,
    chunks,
    dense,
    join,
    per_head,
    plain_gradients,
    scores_of,
    sees_text,
    split,
    text_backward,
    text_forward,
    without_poison,
)

SCORES = 2**18  # of own rows at a time: 1 MB of fp32, which fits a core's cache
FEWEST_ROWS = 32  # of a block, however long the branch


def thought_attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Implements ``reference.thought_attention``."""
    G, L = k.shape[1], branches.L
    out = q.new_empty((*q.shape[:3], v.shape[-1]), dtype=wide(q[:0]).dtype)
    lse = out.new_empty(q.shape[:3])
    if q.numel() == 0:
        return out.to(q.dtype), lse
    k, v, bad = without_poison(k, v)
    k_text, v_text = (dense(x[:, :, :L], lse.dtype) for x in (k, v))
    own = slice(q.shape[2] - branches.R, None)  # the branch rows, among the query rows
    own_forward(q[:, :, own], k[:, :, L:], v[:, :, L:], out[:, :, own], lse[:, :, own], branches, options)
    live = branches.live()
    ragged = not live.all()
    sees_own = live[:, None] & False if bad is None else _sees_own(bad[:, :, L:], branches, options.window)
    for chunk in chunks(branches, q.shape[2], options.window, q.shape[1] // G, lse.dtype):
        rows = split(wide(q[:, :, chunk.rows]), G)
        o, l = (split(x[:, :, chunk.rows], G) for x in (out, lse))
        o_text, l_text = text_forward(rows, k_text, v_text, chunk, options)
        if chunk.own is None:
            o.copy_(o_text)
            l.copy_(l_text)
        else:
            join(o, l, o_text, l_text)
        if options.sinks is not None:
            add_sinks(o, l, options.sinks)
        if bad is not None:
            poisoned = sees_text(bad[:, :, :L], chunk)
            if chunk.own is not None:
                poisoned = poisoned | sees_own[:, :, None, chunk.own]
            o.masked_fill_(poisoned[..., None], math.nan)
            l.masked_fill_(poisoned, math.nan)
        if ragged and chunk.own is not None:
            off = ~live[:, None, None, chunk.own]
            o.masked_fill_(off[..., None], 0)
            l.masked_fill_(off, -math.inf)
    return out.to(q.dtype), lse


def thought_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, branches: Branches,
    options: AttentionOptions, grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Implements ``reference.thought_attention_backward``. Gradients of text keys are summed by chunk, in a fixed order."""
    G, L, sinks = k.shape[1], branches.L, options.sinks
    E = v.shape[-1]
    if grad_lse is not None:  # one more column, so that rowsum(dO * O) is smaller by it and dO v^T stays the same
        grad_out, v = pad(grad_out, (0, 1), value=1), pad(v, (0, 1))
        out = torch.cat([wide(out), -grad_lse[..., None]], -1)
    dtype = (q.dtype, k.dtype, v.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    dsinks = lse.new_zeros(q.shape[1])
    k, v, _ = without_poison(k, v)
    k_text, v_text = (dense(x[:, :, :L], lse.dtype) for x in (k, v))
    delta = _row_sums(grad_out, out, lse)
    # Rows that are off (lse -inf) or have seen a NaN must add nothing to the gradients of the keys.
    dropped = None
    if not (lse.sum() + delta.sum()).isfinite():
        dropped = ~(lse.isfinite() & delta.isfinite())
        not_a_number = dropped & (lse != -math.inf)
        grad_out, q, out = (x.masked_fill(dropped[..., None], 0) for x in (grad_out, q, out))
        lse, delta = lse.masked_fill(dropped, math.inf), delta.masked_fill(dropped, 0)
    own = slice(q.shape[2] - branches.R, None)  # the branch rows, among the query rows
    own_rows = (x[:, :, own] for x in (grad_out, q, delta, lse, dq))
    own_keys = (x[:, :, L:] for x in (k, v, dk, dv))
    own_backward(own_rows, own_keys, branches, options)
    dk_text, dv_text = torch.zeros_like(k_text), torch.zeros_like(v_text)
    for chunk in chunks(branches, q.shape[2], options.window, q.shape[1] // G, lse.dtype):
        g, rows, o, d, l = (split(wide(x[:, :, chunk.rows]), G) for x in (grad_out, q, out, delta, lse))
        dq_text, dkc, dvc = text_backward(g, rows, k_text, v_text, o, d, l, chunk, options)
        dk_text[:, :, chunk.keys] += dkc
        dv_text[:, :, chunk.keys] += dvc
        split(dq[:, :, chunk.rows], G).add_(dq_text)
        if sinks is not None:
            dsinks -= (torch.exp(per_head(sinks, l) - l) * d).sum((0, 3)).flatten()
    if dropped is not None:
        dq.masked_fill_(not_a_number[..., None], math.nan)
    dk[:, :, :L], dv[:, :, :L] = dk_text, dv_text
    dv = dv[..., :E].contiguous()
    dq, dk, dv = (x.to(wanted) for x, wanted in zip((dq, dk, dv), dtype, strict=True))
    return dq, dk, dv, None if sinks is None else dsinks.to(sinks.dtype)


def _row_sums(grad_out: Tensor, out: Tensor, like: Tensor) -> Tensor:
    """rowsum(grad_out * out) [B,H,rows], a head at a time, so that the product stays in the cache."""
    delta = torch.empty_like(like)
    for b in range(len(out)):
        for h in range(out.shape[1]):
            torch.sum(wide(grad_out[b, h]) * wide(out[b, h]), -1, out=delta[b, h])
    return delta


def _sees_own(bad: Tensor, branches: Branches, window: int | None) -> Tensor:
    """bool [B,G,R]: the rows that see one of the own rows bad [B,G,R]."""
    r = torch.arange(branches.R, device=branches.device)
    if branches.tree is not None:  # only where there is a NaN, which is rare
        own = branches.dense_mask(window)[:, branches.L :, branches.L :]
        return (own[:, None].to(torch.float32) @ bad[..., None].to(torch.float32))[..., 0] > 0
    first, live = branches.column(START), branches.live()
    end = first + branches.column(LENGTH) if branches.full else torch.where(live, r + 1, 0)
    if window is not None:
        first = torch.where(live, torch.maximum(first, r + 1 - window), 0)
    before = pad(bad.cumsum(-1), (1, 0))
    first, end = (x[:, None].expand(bad.shape) for x in (first, end))
    return before.gather(2, end) > before.gather(2, first)


@dataclass(frozen=True)
class Block:
    """Some rows of ``count`` branches under query head h, and the own rows that they may see.

    Attributes:
        first: the first row of the first branch.
        spacing: from a branch to the next.
        rows, keys: of each branch.
        mask: additive, 0 or -inf, [rows,keys]; None if all is seen.
        path: of one branch in a tree, the keys of those before it on its path.
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
    path: Tensor | None = None

    def rows_of(self, x: Tensor) -> Tensor:
        """A view [count,rows,...] of x [B,H,R,...]."""
        return self._branches(x[self.b, self.h])[:, self.rows]

    def keys_of(self, x: Tensor) -> Tensor:
        """[count,keys,...] of x [B,G,R,...], a view if there is no path."""
        own = self._branches(x[self.b, self.g])[:, self.keys]
        return own if self.path is None else torch.cat([x[self.b, self.g, self.path][None], own], 1)

    def add_to_keys(self, x: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Adds weights [count,rows,keys] transposed times ``rows`` to x [B,G,R,...]."""
        before = 0 if self.path is None else len(self.path)
        self._branches(x[self.b, self.g])[:, self.keys].baddbmm_(weights[..., before:].transpose(1, 2), rows)
        if self.path is not None:
            x[self.b, self.g].index_add_(0, self.path, weights[0, :, :before].T @ rows[0])

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


def own_backward(rows: Iterable[Tensor], keys: Iterable[Tensor], branches: Branches, options: AttentionOptions) -> None:
    """Writes dq, and adds dk, dv of the own rows, from the joint ``lse`` and ``delta`` = rowsum(grad_out * joint out).

    ``rows``: grad_out, q, delta, lse and dq of the branch rows [B,H,R,...]; ``keys``: their k, v, dk and dv [B,G,R,...].
    """
    grad_out, q, delta, lse, dq = rows
    k, v, dk, dv = keys
    for block in _blocks(branches, q.shape[1], k.shape[1], options.window, lse):
        g3, q3, k3, v3 = (wide(x) for x in (block.rows_of(grad_out), block.rows_of(q), block.keys_of(k), block.keys_of(v)))
        p, ds = plain_gradients(g3, q3, k3, v3, block.rows_of(delta), block.rows_of(lse), block.mask, options)
        torch.bmm(ds, k3, out=block.rows_of(dq))
        block.add_to_keys(dk, ds, q3)
        block.add_to_keys(dv, p, g3)


def _blocks(branches: Branches, H: int, G: int, window: int | None, like: Tensor) -> Iterator[Block]:
    if branches.tree is not None:
        yield from _tree_blocks(branches, H, G, window, like)
        return
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


def _tree_blocks(branches: Branches, H: int, G: int, window: int | None, like: Tensor) -> Iterator[Block]:
    """A block for some rows of a node, over all rows on its path."""
    tree: Tensor = branches.tree  # type: ignore[assignment]
    for b, (table, nodes) in enumerate(zip(branches.table.tolist(), tree.tolist(), strict=True)):
        path: list[tuple[int, int, int]] = []  # (first row, row after the last, row after the subtree)
        for (_, start, s), (depth, end, leaf, _) in zip(table, nodes, strict=True):
            while path and path[-1][2] <= start:
                path.pop()
            full = branches.full and bool(leaf)
            above = torch.cat([torch.arange(first, after) for first, after, _ in path] or [torch.arange(0)])
            rows = max(FEWEST_ROWS, SCORES // max(depth + s, 1))
            for begin in range(0, s, rows):
                stop = min(begin + rows, s)
                oldest = 0 if window is None else max(0, depth + begin + 1 - window)  # of the path
                seen = slice(max(0, oldest - depth), s if full else stop)
                mask = _mask(depth + begin, depth + stop, oldest, depth + seen.stop, full, window, like)
                for h in range(H):
                    yield Block(b, h, h * G // H, start, 1, s, slice(begin, stop), seen, mask, above[oldest:])
            if s:
                path.append((start, start + s, end))


def _mask(begin: int, end: int, first: int, stop: int, full: bool, window: int | None, like: Tensor) -> Tensor | None:
    """Additive, of rows begin..end over rows first..stop."""
    s, key = torch.arange(begin, end)[:, None], torch.arange(first, stop)
    seen = torch.ones(end - begin, stop - first, dtype=torch.bool) if full else key <= s
    if window is not None:
        seen = seen & (key > s - window)
    return None if bool(seen.all()) else torch.where(seen, 0.0, -math.inf).to(like)
