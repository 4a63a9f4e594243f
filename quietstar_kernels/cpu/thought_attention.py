"""thought_attention on CPUs: per chunk of rows, the text by flash attention and the own thoughts by small matmuls.

The rows of a chunk are seen as [B,G,h,c,s,K]: h query heads share a key head, c thoughts of s rows (text rows: c rows,
s = 1). The text part takes (h,c,s) as its rows and the own part (h,s) as the rows of each thought: keys are never repeated.
Everything is fp32 (fp64 for fp64 inputs), since PyTorch's half-precision flash attention is not faster on CPUs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quietstar_kernels.cpu._chunks import Chunk, by_thought, chunks, from_thought, split
from quietstar_kernels.cpu._parts import join, plain, plain_backward, text, text_backward
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
    k_text, v_text = wide(k[:, :, :L]), wide(v[:, :, :L])
    heads = q.shape[1] // G
    own_mask = _own_mask(S, window, lse)
    live = layout.live().flatten(1, 2)
    ragged = not live.all()
    for chunk in chunks(layout, window, heads, lse.dtype, query_rows):
        rows = split(wide(q[:, :, chunk.rows]), G, chunk.s)
        o, l = text(rows, k_text, v_text, chunk, scale, softcap)
        if chunk.thoughts is not None:
            k_own, v_own = (split(wide(x[:, :, _own(chunk, L)]), G, S) for x in (k, v))
            own = plain(*map(by_thought, (rows, k_own, v_own)), own_mask.repeat(heads, 1), scale, softcap)
            o, l = join(o, l, *(from_thought(x, l.shape) for x in own))
        if sinks is not None:
            o, l = add_sinks(o, l, sinks)
        if bad is not None:
            poisoned = _sees(bad, chunk, own_mask, L)
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
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dsinks = None if sinks is None else sinks.new_zeros(sinks.shape, dtype=lse.dtype)
    if q.numel() == 0:
        return dq, dk, dv, None if sinks is None else dsinks.to(sinks.dtype)
    k, v, _ = without_poison(k, v)
    k_text, v_text = wide(k[:, :, :L]), wide(v[:, :, :L])
    dk_text, dv_text = torch.zeros_like(k_text), torch.zeros_like(v_text)
    heads = q.shape[1] // G
    own_mask = _own_mask(S, window, lse).repeat(heads, 1)
    for chunk in chunks(layout, window, heads, lse.dtype, query_rows):
        g, rows, o, l = (split(wide(x[:, :, chunk.rows]), G, chunk.s) for x in (grad_out, q, out, lse))
        delta = (g * o).sum(-1)
        # Rows that are off (lse -inf) or have seen NaN must add nothing to the keys' gradients.
        dropped = None
        if not (l.sum() + delta.sum()).isfinite():
            dropped = ~(l.isfinite() & delta.isfinite())
            not_a_number = dropped & (l != -math.inf)
            g, rows, o = (x.masked_fill(dropped[..., None], 0) for x in (g, rows, o))
            l, delta = l.masked_fill(dropped, math.inf), delta.masked_fill(dropped, 0)
        dqc, dkc, dvc = text_backward(g, rows, k_text, v_text, o, delta, l, chunk, scale, softcap)
        dk_text[:, :, chunk.keys] += dkc
        dv_text[:, :, chunk.keys] += dvc
        if chunk.thoughts is not None:
            own = _own(chunk, L)
            k_own, v_own = (split(wide(x[:, :, own]), G, S) for x in (k, v))
            g3, q3, k3, v3, delta3, l3 = map(by_thought, (g, rows, k_own, v_own, delta, l))
            dq3, dk3, dv3 = plain_backward(g3, q3, k3, v3, delta3, l3, own_mask, scale, softcap)
            dqc = dqc + from_thought(dq3, l.shape)
            split(dk[:, :, own], G, S).copy_(from_thought(dk3, k_own.shape))
            split(dv[:, :, own], G, S).copy_(from_thought(dv3, v_own.shape))
        if dsinks is not None:
            dsinks -= (torch.exp(_per_head(sinks, l) - l) * delta).sum((0, 3, 4)).flatten()
        if dropped is not None:
            dqc = dqc.masked_fill(not_a_number[..., None], math.nan)
        split(dq[:, :, chunk.rows], G, chunk.s).copy_(dqc)
    dk[:, :, :L], dv[:, :, :L] = dk_text, dv_text
    return dq, dk, dv, None if dsinks is None else dsinks.to(sinks.dtype)


def without_poison(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v with every key zeroed that holds a NaN or an infinity, and which keys [B,G,keys] those are, None if none.

    A masked weight is 0, but 0 * NaN is not. The two sums are cheap next to the look at every element.
    """
    if (k.sum(dtype=wide(k[:0]).dtype) + v.sum(dtype=wide(v[:0]).dtype)).isfinite():
        return k, v, None
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    return k.masked_fill(bad[..., None], 0), v.masked_fill(bad[..., None], 0), bad


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink takes its part of the softmax and gives no value. out [B,G,h,c,s,E], sinks [H]."""
    joint = torch.logaddexp(lse, _per_head(sinks, lse))
    return out * torch.exp(lse - joint)[..., None], joint


def _per_head(sinks: Tensor, like: Tensor) -> Tensor:
    return sinks.to(like.dtype).view(1, *like.shape[1:3], 1, 1)


def _own(chunk: Chunk, L: int) -> slice:
    """The chunk's own rows among the packed keys."""
    return slice(L + chunk.thoughts.start * chunk.s, L + chunk.thoughts.stop * chunk.s)


def _own_mask(S: int, window: int | None, like: Tensor) -> Tensor:
    """[S,S], 0 where row s sees own row s', else -inf."""
    hidden = like.new_full((S, S), -math.inf)
    mask = hidden.triu(1)
    return mask if window is None else mask + hidden.tril(-window)


def _sees(bad: Tensor, chunk: Chunk, own_mask: Tensor, L: int) -> Tensor:
    """bool [B,G,1,c,s]: the chunk's rows that see one of the keys bad [B,G,M]."""
    shape = bad.shape[:2] + ((chunk.rows.stop - chunk.rows.start) // chunk.s, chunk.s)
    seen = torch.zeros(shape, dtype=torch.bool, device=bad.device)
    if chunk.mask is not None:
        mask = chunk.mask[:, :, : shape[2] * shape[3]]  # the first head's
        seen |= ((mask == 0) & bad[:, :, None, chunk.keys]).any(-1).view(shape)
    if chunk.thoughts is not None:
        own = bad[:, :, _own(chunk, L)].view(shape)
        seen |= (own[..., None, :] & (own_mask == 0)).any(-1)
    return seen[:, :, None]
