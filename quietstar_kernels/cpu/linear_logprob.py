"""linear_logprob on CPUs: the reference, a bounded number of rows at a time, its logits computed again in the backward.

Logits are fp32 for half-precision inputs too (fp64 for fp64): the weight is cast once per call, the hidden states per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels import reference
from quietstar_kernels.cpu._head import row_chunks
from quietstar_kernels.reference import wide


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: list[int],
    return_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """As ``reference.linear_logprob``."""
    weight = wide(weight)
    logprob, entropy = weight.new_empty(len(hidden)), weight.new_zeros(len(hidden))
    for rows in row_chunks(len(hidden), len(weight)):
        if return_entropy:
            logprob[rows], entropy[rows] = reference.linear_logprob(
                hidden[rows], weight, targets[rows], bias, scale, softcap, temperature, banned, return_entropy
            )
            continue
        logits = reference.final_logits(hidden[rows], weight, bias, scale, softcap, temperature, banned)
        picked = logits.gather(1, targets[rows].clamp(min=0)[:, None])[:, 0]
        logprob[rows] = torch.where(targets[rows] == -100, 0, picked - logits.logsumexp(-1))
    return logprob, entropy


def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: list[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``reference.linear_logprob_backward``; the weight's gradient adds up chunk after chunk, always in the same order."""
    w = wide(weight)
    dhidden = hidden.new_empty(hidden.shape)
    dweight, dbias = torch.zeros_like(w), w.new_zeros(len(w))
    for rows in row_chunks(len(hidden), len(w)):
        h = wide(hidden[rows])
        logits = reference.final_logits(h, w, bias, scale, softcap, temperature, banned)
        if grad_entropy is None and softcap is None:
            d = _logprob_grad(logits, targets[rows], grad_logprob[rows], (scale or 1.0) / temperature)
        else:
            raw = reference.linear(h, w, bias, scale)
            g_entropy = None if grad_entropy is None else grad_entropy[rows]
            g = grad_logprob[rows]
            d = reference.logprob_grad(logits, raw, targets[rows], g, g_entropy, scale, softcap, temperature)
        dhidden[rows] = d @ w
        dweight.addmm_(d.T, h)
        dbias += d.sum(0)
    return dhidden, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def _logprob_grad(logits: Tensor, targets: Tensor, grad: Tensor, factor: float) -> Tensor:
    """``reference.logprob_grad`` without soft cap and entropy, in few passes: factor * grad * (one-hot - softmax)."""
    g = torch.where(targets == -100, 0, grad * factor)[:, None]
    d = logits.softmax(-1).mul_(-g)
    return d.scatter_add_(1, targets.clamp(min=0)[:, None], g)
