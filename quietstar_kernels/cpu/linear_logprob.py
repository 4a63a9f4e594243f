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
) -> tuple[Tensor, Tensor]:
    """As ``reference.linear_logprob``."""
    weight = wide(weight)
    logprob, entropy = weight.new_empty(len(hidden)), weight.new_empty(len(hidden))
    for rows in row_chunks(len(hidden), len(weight)):
        logprob[rows], entropy[rows] = reference.linear_logprob(
            hidden[rows], weight, targets[rows], bias, scale, softcap, temperature, banned
        )
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
        # The uncapped logits matter only where there is a cap.
        raw = logits if softcap is None else reference.linear(h, w, bias, scale)
        g_entropy = None if grad_entropy is None else grad_entropy[rows]
        d = reference.logprob_grad(logits, raw, targets[rows], grad_logprob[rows], g_entropy, scale, softcap, temperature)
        dhidden[rows] = d @ w
        dweight.addmm_(d.T, h)
        dbias += d.sum(0)
    return dhidden, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)
