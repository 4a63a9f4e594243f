"""Attention of a chunk's rows over one part of their keys. Two parts are joined by their LSE.

PyTorch's CPU flash attention computes the text. The small own blocks take a softmax between two matmuls, and so does text with
a soft cap, which the flash attention doesn't have. The gradient of a part needs only the joint out and LSE of both parts, since
exp(score - LSE) is the joint softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.cpu.plain._chunks import Chunk
from quietstar_kernels.reference import wide

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    masks = chunk.mask.expand(len(q), -1, -1, -1)
    served = [plain_backward(grad_out[b], q[b], k[b], v[b], delta[b], lse[b], masks[b], options) for b in range(len(q))]
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


def plain_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the joint ``lse`` and ``delta`` = rowsum(grad_out * joint out)."""
    scores = scores_of(q, k, options)
    slope = None if options.softcap is None else 1 - (scores / options.softcap) ** 2
    if mask is not None:
        scores += mask
    p = scores.sub_(lse[..., None]).exp_()
    ds = (grad_out @ v.transpose(-1, -2)).sub_(delta[..., None]).mul_(p).mul_(options.scale)
    if slope is not None:
        ds *= slope
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out


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
