"""The ops in plain dense PyTorch, every step in the dtype of the inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ..layout import ThoughtLayout
from ..reference import decode_mask


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThoughtLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_rows: str = "all",
) -> tuple[Tensor, Tensor]:
    """``thought_attention`` with ``return_lse`` in dense PyTorch, every step in q's dtype; differentiable by autograd."""
    skip = 0 if query_rows == "all" else layout.L
    return _plain(q, k, v, layout.dense_mask(window)[:, skip:], scale, softcap, sinks)


def plain_decode(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    layout: ThoughtLayout,
    step: int | Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``thought_decode`` in dense PyTorch, every step in q's dtype; rows that nobody sees must be finite."""
    lo, table, _, _, tree, _ = layout.branches
    mask, _ = decode_mask(lo, table, tree, k_own.shape[3], step, window)
    k, v = torch.cat([k_text, k_own.flatten(2, 3)], 2), torch.cat([v_text, v_own.flatten(2, 3)], 2)
    return _plain(q, k, v, mask, scale, softcap, sinks)[0]


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B,H,rows,K] over k, v [B,G,keys,...] under a mask [B,rows,keys]; a row that sees nothing is off."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    on = mask.any(-1)[:, None]
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * torch.matmul(q, k.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # A row that is off sees everything, so that nothing is NaN; its result is dropped.
    scores = scores.masked_fill(~(mask[:, None] | ~on[..., None]), -math.inf)
    if sinks is not None:
        column = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    # exp(score - lse) as in the op, in fp32 even for half precision; so does torch.softmax.
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    lse = torch.logsumexp(wide, -1)
    p = torch.exp(wide - lse[..., None])[..., : k.shape[2]].to(q.dtype)
    return torch.matmul(p, v).masked_fill(~on[..., None], 0), lse.masked_fill(~on, -math.inf)


def plain_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> Tensor:
    """The log of the distribution of ``sample_token`` and ``linear_logprob``, [R,V], every step in hidden's dtype."""
    logits = torch.matmul(hidden, weight.T)
    if bias is not None:
        logits = logits + bias
    if scale is not None:
        logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    out = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    out[list(banned)] = True
    return torch.log_softmax(logits.masked_fill(out, -math.inf) / temperature, -1)


def plain_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """``linear_logprob`` with ``return_entropy`` in dense PyTorch, every step in hidden's dtype; differentiable by autograd.

    Args:
        options: scale, softcap, temperature, banned.
    """
    logp = plain_log_softmax(hidden, weight, bias, **options)
    logprob = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -100, 0)
    return logprob, -(logp.exp() * logp.masked_fill(logp.isinf(), 0)).sum(-1)


def plain_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    beta: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """``linear_divergence`` in dense PyTorch, every step in the dtype of its inputs; differentiable by autograd."""
    s = plain_log_softmax(hidden, weight, bias, scale, softcap, temperature)
    t = plain_log_softmax(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, temperature).detach()
    if beta in (0, 1):
        p, q = (s, t) if beta else (t, s)
        return (p.exp() * (p - q)).sum(-1)
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layout: ThoughtLayout) -> Tensor:
    """``thought_conv`` from each row to the row before it, W times, every step in x's dtype; differentiable by autograd."""
    parent, W = layout.branches.parent_rows(), weight.shape[1]
    b, m = layout.branches.rows_on().nonzero().T
    row, total = m, x.new_zeros(len(m), x.shape[-1]) + (0 if bias is None else bias)
    for i in range(W):
        total = total + x[b, row].where((row >= 0)[:, None], 0) * weight[:, W - 1 - i]
        row = parent[b, row].where(row >= 0, -1)
    return torch.zeros_like(x).index_put((b, m), total)


def plain_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, delta: Tensor | None = None, offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``rms_norm``, every step in x's dtype; differentiable by autograd. In fp64 ``dtype`` is ignored."""
    total = x if delta is None else (x + delta).to(x.dtype)
    out = _normed(total, weight, eps, offset)
    return total, out.to(x.dtype if dtype is None or x.dtype == torch.float64 else dtype)


def plain_rotary(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, heads: tuple[int, int],
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6, offset: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``rotary``, every step in qkv's dtype or that of cos; differentiable by autograd."""
    K, (H, G) = cos.shape[-1], heads
    parts = qkv.split((H * K, G * K, G * K), -1) if k is None or v is None else (qkv, k, v)
    rows = [x.unflatten(-1, (-1, K)).transpose(1, 2) for x in parts]
    for i, weight in enumerate((q_weight, k_weight)):
        x = rows[i] if weight is None else _normed(rows[i], weight, eps, offset)
        turned = torch.cat([-x[..., K // 2 :], x[..., : K // 2]], -1)
        rows[i] = (x * cos[:, None] + turned * sin[:, None]).to(qkv.dtype)
    return tuple(rows)


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight)


def plain_gated(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """``gated_activation``, every step in gate's dtype; differentiable by autograd."""
    x, y = gate.chunk(2, -1) if up is None else (gate, up)
    return (silu(x) if activation == "silu" else gelu(x, approximate="tanh")) * y
