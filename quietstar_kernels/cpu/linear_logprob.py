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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.linear_logprob``."""
    weight = wide(weight)
    logprob, entropy, largest, log_total = (weight.new_zeros(len(hidden)) for _ in range(4))
    for rows in row_chunks(len(hidden), len(weight)):
        if return_entropy:
            logprob[rows], entropy[rows], largest[rows], log_total[rows] = reference.linear_logprob(
                hidden[rows], weight, targets[rows], bias, scale, softcap, temperature, banned, return_entropy
            )
            continue
        logits = reference.final_logits(hidden[rows], weight, bias, scale, softcap, temperature, banned)
        picked = logits.gather(1, targets[rows].clamp(min=0)[:, None])[:, 0]
        largest[rows] = logits.amax(-1)
        log_total[rows] = logits.sub_(largest[rows, None]).exp_().sum(-1).log()
        logprob[rows] = torch.where(targets[rows] == -100, 0, picked - largest[rows] - log_total[rows])
    return logprob, entropy, largest, log_total


def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    largest: Tensor,
    log_total: Tensor,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: list[int],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.linear_logprob_backward``; the weight's gradient adds up chunk after chunk, always in the same order."""
    w = wide(weight)
    dhidden = hidden.new_empty(hidden.shape) if wanted[0] else None
    dweight = torch.zeros_like(w) if wanted[1] else None
    dbias = w.new_zeros(len(w)) if wanted[2] else None
    for rows in row_chunks(len(hidden), len(w)):
        h = wide(hidden[rows])
        logits = reference.final_logits(h, w, bias, scale, softcap, temperature, banned)
        g = grad_logprob[rows]
        if grad_entropy is None and softcap is None:
            factor = (1.0 if scale is None else scale) / temperature
            d = _logprob_grad(logits, targets[rows], g, largest[rows], log_total[rows], factor)
            d[:, banned] = 0
        else:
            raw = reference.linear(h, w, bias, scale)
            g_entropy = None if grad_entropy is None else grad_entropy[rows]
            states = (entropy[rows], largest[rows], log_total[rows])
            d = reference.logprob_grad(logits, raw, targets[rows], g, g_entropy, *states, scale, softcap, temperature)
        if dhidden is not None:
            dhidden[rows] = d @ w
        if dweight is not None:
            dweight.addmm_(d.T, h)
        if dbias is not None:
            dbias += d.sum(0)
    return dhidden, None if dweight is None else dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype)


def _logprob_grad(logits: Tensor, targets: Tensor, grad: Tensor, largest: Tensor, log_total: Tensor, factor: float) -> Tensor:
    """``reference.logprob_grad`` without soft cap and entropy, in few passes: factor * grad * (one-hot - softmax)."""
    g = torch.where(targets == -100, 0, grad * factor)[:, None]
    d = logits.sub_(largest[:, None]).exp_().mul_(-g * (-log_total[:, None]).exp())
    return d.scatter_add_(1, targets.clamp(min=0)[:, None], g)
