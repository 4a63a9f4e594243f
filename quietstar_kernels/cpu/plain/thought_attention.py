"""thought_attention on CPUs: the own part of all branches first, then the text by flash attention, a chunk of rows at a time.

The c rows of a chunk are viewed as [B,G,h,c,K]: h query heads share a key head. To the text part (h,c) are rows, so that keys
are never repeated.
Everything is fp32 (fp64 for fp64 inputs): PyTorch's half-precision flash attention is no faster on CPUs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.branches import Branches
from quietstar_kernels.cpu.plain._chunks import chunks, dense, split
from quietstar_kernels.cpu.plain._own import own_backward, own_forward, own_range
from quietstar_kernels.cpu.plain._parts import add_sinks, join, per_head, sees_text, text_backward, text_forward, without_poison
from quietstar_kernels.reference import wide


def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    branches: Branches,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """As ``reference.thought_attention``."""
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
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    branches: Branches,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``reference.thought_attention_backward``; those of text keys are summed chunk by chunk, always in the same order."""
    G, L, sinks = k.shape[1], branches.L, options.sinks
    if q.numel() == 0:
        none = None if sinks is None else torch.zeros_like(sinks)
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), none
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
    own_backward(
        grad_out[:, :, own],
        q[:, :, own],
        k[:, :, L:],
        v[:, :, L:],
        delta[:, :, own],
        lse[:, :, own],
        dq[:, :, own],
        dk[:, :, L:],
        dv[:, :, L:],
        branches,
        options,
    )
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
    before = torch.nn.functional.pad(bad.cumsum(-1), (1, 0))
    first, end = (x[:, None].expand(bad.shape) for x in own_range(branches, window))
    return before.gather(2, end) > before.gather(2, first)
