"""thought_attention on CPUs: per chunk of rows, the text by flash attention and the own thoughts by small matmuls.

The rows of a chunk are seen as [B,G,h,c,s,K]: h query heads share a key head, c thoughts of s rows (text rows: c rows,
s = 1). The text part takes (h,c,s) as its rows and the own part (h,s) as the rows of each thought: keys are never repeated.
Everything is fp32 (fp64 for fp64 inputs): PyTorch's half-precision flash attention is no faster on CPUs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quietstar_kernels.cpu._chunks import by_thought, chunks, dense, from_thought, split
from quietstar_kernels.cpu._parts import (
    add_sinks,
    join,
    per_head,
    plain,
    plain_backward,
    sees_text,
    text,
    text_backward,
    without_poison,
)
from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.reference import wide


def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThoughtLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    query_rows: str,
) -> tuple[Tensor, Tensor]:
    """As ``reference.thought_attention``."""
    G, L, S = k.shape[1], layout.L, layout.S
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=wide(q[:0]).dtype)
    if q.numel() == 0:
        return out, lse
    k, v, bad = without_poison(k, v)
    k_text, v_text = (dense(x[:, :, :L], lse.dtype) for x in (k, v))
    heads = q.shape[1] // G
    own_mask = _own_mask(S, window, heads, lse)
    live = layout.live().flatten(1, 2)
    ragged = not live.all()
    for chunk in chunks(layout, window, heads, lse.dtype, query_rows):
        rows = dense(split(q[:, :, chunk.rows], G, chunk.s), lse.dtype)
        o, l = text(rows, k_text, v_text, chunk, scale, softcap)
        if chunk.thoughts is not None:
            own = _own_rows(chunk.thoughts, layout)
            q3, k3, v3 = (by_thought(x) for x in (rows, _own(k, own, S, l), _own(v, own, S, l)))
            o3, l3 = plain(q3, k3, v3, own_mask, scale, softcap)
            o, l = join(o, l, from_thought(o3, l.shape), from_thought(l3, l.shape))
        if sinks is not None:
            o, l = add_sinks(o, l, sinks)
        if bad is not None:
            poisoned = sees_text(bad[:, :, :L], chunk)
            if chunk.thoughts is not None:
                poisoned = poisoned | _sees_own(bad[:, :, own], own_mask, S)
            o, l = o.masked_fill(poisoned[..., None], math.nan), l.masked_fill(poisoned, math.nan)
        if ragged and chunk.thoughts is not None:
            off = ~live[:, None, None, chunk.thoughts]
            o, l = o.masked_fill(off[..., None], 0), l.masked_fill(off, -math.inf)
        split(out[:, :, chunk.rows], G, chunk.s).copy_(o)
        split(lse[:, :, chunk.rows], G, chunk.s).copy_(l)
    return out, lse


def thought_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: ThoughtLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    query_rows: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``reference.thought_attention_backward``; text keys add up chunk after chunk, always in the same order."""
    G, L, S = k.shape[1], layout.L, layout.S
    if q.numel() == 0:
        none = None if sinks is None else torch.zeros_like(sinks)
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), none
    dsinks = lse.new_zeros(q.shape[1])
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    k, v, _ = without_poison(k, v)
    k_text, v_text = (dense(x[:, :, :L], lse.dtype) for x in (k, v))
    dk_text, dv_text = torch.zeros_like(k_text), torch.zeros_like(v_text)
    heads = q.shape[1] // G
    own_mask = _own_mask(S, window, heads, lse)
    for chunk in chunks(layout, window, heads, lse.dtype, query_rows):
        g, rows = (dense(split(x[:, :, chunk.rows], G, chunk.s), lse.dtype) for x in (grad_out, q))
        o, l = (split(wide(x[:, :, chunk.rows]), G, chunk.s) for x in (out, lse))
        delta = (g * o).sum(-1)
        # Rows that are off (lse -inf) or have seen NaN must add nothing to the keys' gradients.
        dropped = None
        if not (l.sum() + delta.sum()).isfinite():
            dropped = ~(l.isfinite() & delta.isfinite())
            not_a_number = dropped & (l != -math.inf)
            g, rows, o = (x.masked_fill(dropped[..., None], 0) for x in (g, rows, o))
            l, delta = l.masked_fill(dropped, math.inf), delta.masked_fill(dropped, 0)
        dq_text, dkc, dvc = text_backward(g, rows, k_text, v_text, o, delta, l, chunk, scale, softcap)
        dk_text[:, :, chunk.keys] += dkc
        dv_text[:, :, chunk.keys] += dvc
        dq_own: Tensor | int = 0
        if chunk.thoughts is not None:
            own = _own_rows(chunk.thoughts, layout)
            k_own, v_own = _own(k, own, S, l), _own(v, own, S, l)
            g3, q3, k3, v3, delta3, l3 = (by_thought(x) for x in (g, rows, k_own, v_own, delta, l))
            dq3, dk3, dv3 = plain_backward(g3, q3, k3, v3, delta3, l3, own_mask, scale, softcap)
            dq_own = from_thought(dq3, l.shape)
            split(dk[:, :, own], G, S).copy_(from_thought(dk3, k_own.shape))
            split(dv[:, :, own], G, S).copy_(from_thought(dv3, v_own.shape))
        if sinks is not None:
            dsinks -= (torch.exp(per_head(sinks, l) - l) * delta).sum((0, 3, 4)).flatten()
        dqc = split(dq[:, :, chunk.rows], G, chunk.s)
        torch.add(dq_text, dq_own, out=dqc)
        if dropped is not None:
            dqc.masked_fill_(not_a_number[..., None], math.nan)
    dk[:, :, :L], dv[:, :, :L] = dk_text, dv_text
    return dq, dk, dv, None if sinks is None else dsinks.to(sinks.dtype)


def _own_rows(thoughts: slice, layout: ThoughtLayout) -> slice:
    """The rows of these thoughts among the packed rows."""
    return slice(layout.L + thoughts.start * layout.S, layout.L + thoughts.stop * layout.S)


def _own(x: Tensor, own: slice, S: int, like: Tensor) -> Tensor:
    """These rows of the packed keys or values x [B,G,M,...] as [B,G,1,c,S,...]."""
    return dense(split(x[:, :, own], x.shape[1], S), like.dtype)


def _own_mask(S: int, window: int | None, heads: int, like: Tensor) -> Tensor:
    """[heads*S,S], 0 where row s of a head sees own row s', else -inf."""
    hidden = like.new_full((S, S), -math.inf)
    mask = hidden.triu(1) if window is None else hidden.triu(1) + hidden.tril(-window)
    return mask.repeat(heads, 1)


def _sees_own(bad: Tensor, own_mask: Tensor, S: int) -> Tensor:
    """bool [B,G,1,c,S]: the rows that see one of the own rows bad [B,G,c*S]."""
    bad = bad.unflatten(2, (-1, 1, S))
    return (bad & (own_mask[:S] == 0)).any(-1)[:, :, None]
