"""Attention of query rows over the text: in chunks of rows that see about the same text, each with a small additive mask.

PyTorch's CPU flash attention computes it. That has no soft cap: with one, it is a softmax between two matmuls. Two parts of a
row's keys, such as the text and its own rows, are joined by their LSE. The gradient of a part needs only the joint out and LSE
of both, since exp(score - LSE) is the joint softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._options import AttentionOptions
from ...branches import ANCHOR, DEPTH, LENGTH, Branches
from ...reference import wide

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

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
    mask: Tensor | None
    blind: Tensor | None


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


def step_chunks(
    lo: Tensor, table: Tensor, tree: Tensor | None, step: int, window: int | None, heads: int, dtype: torch.dtype
) -> Iterator[Chunk]:
    """Row ``step`` of every branch, the query rows of ``thought_decode``."""
    t = table[..., ANCHOR].long().masked_fill(table[..., LENGTH] <= step, -1)
    at = t.clamp(min=0)
    row = step if tree is None else step + tree[..., DEPTH].long()
    position = at - lo.long().gather(1, at) + 1 + row if lo.shape[1] else t
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


def text_forward(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Rows q [B,G,h,c,K] over the chunk's keys of the text, k [B,G,L,K]: out [B,G,h,c,E] and lse [B,G,h,c]."""
    rows = q.shape[2:4]
    if chunk.mask is None:
        return q.new_zeros((*q.shape[:4], v.shape[-1])), q.new_full(q.shape[:4], -math.inf)
    q, k, v = q.flatten(2, 3), k[:, :, chunk.keys], v[:, :, chunk.keys]
    if options.softcap is None:
        E = v.shape[-1]
        out, lse = _flash(*_equal_widths(q, k, v), 0.0, False, attn_mask=chunk.mask, scale=options.scale)
        out, lse = out[..., :E].unflatten(2, rows), lse.unflatten(2, rows)
        if chunk.blind is not None:
            lse = lse.masked_fill(chunk.blind, -math.inf)  # the flash attention gives 0
        return out, lse
    masks = chunk.mask.expand(len(q), -1, -1, -1)
    # One batch row at a time, since its scores are materialised here.
    served = [plain(q[b], k[b], v[b], masks[b], options) for b in range(len(q))]
    out, lse = (torch.stack(x).unflatten(2, rows) for x in zip(*served, strict=True))
    return out, lse


def text_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    delta: Tensor,
    lse: Tensor,
    chunk: Chunk,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B,G,h,c,K], and dk, dv of the chunk's keys, from the joint ``out``, ``delta`` and ``lse`` of the rows."""
    rows, K, E = q.shape[2:4], q.shape[-1], v.shape[-1]
    grad_out, q, out, delta, lse = (x.flatten(2, 3) for x in (grad_out, q, out, delta, lse))
    k, v = k[:, :, chunk.keys], v[:, :, chunk.keys]
    if chunk.mask is None:
        return torch.zeros_like(q).unflatten(2, rows), torch.zeros_like(k), torch.zeros_like(v)
    if options.softcap is None:
        wide_ones = _equal_widths(grad_out, q, k, v, out)
        dq, dk, dv = _flash_backward(*wide_ones, lse, 0.0, False, attn_mask=chunk.mask, scale=options.scale)
        return dq[..., :K].unflatten(2, rows), dk[..., :K], dv[..., :E]
    served = []
    for b, mask in enumerate(chunk.mask.expand(len(q), -1, -1, -1)):
        p, ds = plain_gradients(grad_out[b], q[b], k[b], v[b], delta[b], lse[b], mask, options)
        served.append((ds @ k[b], ds.mT @ q[b], p.mT @ grad_out[b]))
    dq, dk, dv = (torch.stack(x) for x in zip(*served, strict=True))
    return dq.unflatten(2, rows), dk, dv


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """q [...,rows,K] over k [...,keys,K]: out [...,rows,E] and lse [...,rows]; a row that sees nothing gets 0 and -inf."""
    scores = scores_of(q, k, options)
    if mask is not None:
        scores += mask
    top = scores.amax(-1, keepdim=True)
    p = scores.sub_(top.clamp(min=torch.finfo(top.dtype).min)).exp_()  # not -inf - -inf where a row sees nothing
    total = p.sum(-1, keepdim=True).clamp_(min=1)  # at least 1, the largest weight, unless the row sees nothing
    return p.div_(total) @ v, (top + total.log_())[..., 0]


def plain_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """The weights, and the gradient of q k^T, from the joint ``lse`` and ``delta`` = rowsum(grad_out * joint out)."""
    scores = scores_of(q, k, options)
    slope = None if options.softcap is None else 1 - (scores / options.softcap) ** 2
    if mask is not None:
        scores += mask
    p = scores.sub_(lse[..., None]).exp_()
    ds = (grad_out @ v.transpose(-1, -2)).sub_(delta[..., None]).mul_(p).mul_(options.scale)
    if slope is not None:
        ds *= slope
    return p, ds


def join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """``out`` and ``lse``, finite, become those of attention over the keys of both parts."""
    out.lerp_(other_out, torch.sigmoid(other_lse - lse)[..., None])
    torch.logaddexp(lse, other_lse, out=lse)


def without_poison(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v with every key zeroed that holds a NaN or an infinity, and which keys [B,G,keys] those are, None if none.

    A masked weight is 0, but 0 * NaN is not. The two sums are cheap, compared with checking every element. Clones keep their
    strides, so that the matmuls round as they do without a NaN.
    """
    if (k.sum(dtype=wide(k[:0]).dtype) + v.sum(dtype=wide(v[:0]).dtype)).isfinite():
        return k, v, None
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    return k.clone().masked_fill_(bad[..., None], 0), v.clone().masked_fill_(bad[..., None], 0), bad


def sees_text(bad: Tensor, chunk: Chunk) -> Tensor:
    """bool [B,G,1,c]: the chunk's rows that see one of the text keys bad [B,G,L]."""
    count = chunk.rows.stop - chunk.rows.start
    if chunk.mask is None:
        seen = bad.new_zeros((*bad.shape[:2], count))
    else:
        seen = ((chunk.mask[:, :, :count] == 0) & bad[:, :, None, chunk.keys]).any(-1)
    return seen[:, :, None]


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Add a logit per head that has no value: out [B,G,h,c,E] and lse [B,G,h,c] become the joint ones."""
    joint = torch.logaddexp(lse, per_head(sinks, lse))
    out *= torch.exp(lse - joint)[..., None]
    lse.copy_(joint)


def per_head(sinks: Tensor, like: Tensor) -> Tensor:
    """[1,G,h,1], which broadcasts with ``like`` [B,G,h,c]."""
    return sinks.to(like.dtype).view(1, *like.shape[1:3], 1)


def scores_of(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """softcap(scale * q k^T), a new tensor."""
    scores = q @ k.transpose(-1, -2)
    if options.softcap is None:
        return scores.mul_(options.scale)
    return scores.mul_(options.scale / options.softcap).tanh_().mul_(options.softcap)


def _equal_widths(*tensors: Tensor) -> list[Tensor]:
    """Zero columns change neither a score nor a kept column of the output."""
    width = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors]
