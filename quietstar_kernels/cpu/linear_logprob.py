"""linear_logprob on CPUs: a bounded number of rows at a time.

Logits become weights, exp(logit - largest), in place, and weights become the gradient of the loss by the logits. The forward
keeps the weights for the backward, or the backward computes them again.

Everything is fp32, for half-precision inputs too (fp64 for fp64): the weight is cast once per call, hidden states per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._options import Head, Saved
from ..reference import wide
from ._head import chunk_rows, row_chunks
from .products import add_product, multiply

LEAST = -1000.0  # the log of a probability that underflowed: any finite number will do, since it is multiplied by 0


def empty_kept(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what a forward keeps: the weights [R,V], and the log-probability of each row's target [R,1]."""
    like = wide(hidden.new_empty(0))
    R = hidden.shape[0]  # len(hidden) would fix a symbolic size
    return like.new_empty(R, len(weight)), like.new_empty(R, 1)


def linear_logprob(
    hidden: Tensor, head: Head, targets: Tensor, return_entropy: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Implements ``reference.linear_logprob``."""
    softmax = _Softmax(head)
    weight = softmax.weight
    R, V = len(hidden), len(weight)
    states = weight.new_empty(4, R)
    buffer = weight.new_empty(R if keep else chunk_rows(R, V), V)
    gaps = weight.new_empty(chunk_rows(R, V), V) if return_entropy else None
    if keep:  # one product: that of few rows by a large vocabulary is up to 1.7 times slower
        buffer = softmax.products(hidden, buffer)
    for rows in row_chunks(R, V):
        out = buffer[rows] if keep else softmax.products(hidden[rows], buffer[: rows.stop - rows.start])
        softmax.weights(out, targets[rows], gaps, states[:, rows])
    picked, entropy, largest, log_total = (state.clone() for state in states)
    logprob = torch.where(targets == -100, 0, picked)
    return logprob, entropy, largest, log_total, *((buffer, picked[:, None]) if keep else (None, None))


def linear_logprob_backward(
    grad_logprob: Tensor, grad_entropy: Tensor | None, hidden: Tensor, head: Head, targets: Tensor, saved: Saved,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Implements ``reference.linear_logprob_backward``."""
    entropy, largest, log_total, kept, kept_rows = saved
    softmax = _Softmax(head)
    weight = softmax.weight
    R, V = len(hidden), len(weight)
    gradients = Gradients(hidden, weight, wanted)
    buffer = weight.new_empty(chunk_rows(R, V), V)
    gaps = None if kept is not None or grad_entropy is None else torch.empty_like(buffer)
    states = weight.new_empty(4, R) if kept_rows is None else torch.stack([kept_rows[:, 0], entropy, largest, log_total])
    for rows in row_chunks(R, V):
        weights = d = buffer[: rows.stop - rows.start]
        if kept is not None:
            weights = kept[rows]
        else:
            weights = d = softmax.products(hidden[rows], d)
            softmax.weights(d, targets[rows], gaps, states[:, rows])
            # The saved states may be of more ids than the weight's.
            more = largest[rows] - states[2, rows] + log_total[rows] - states[3, rows]
            states[0, rows] -= more
            states[1, rows] = entropy[rows]
            states[3, rows] += more
        of_entropy = None if grad_entropy is None else grad_entropy[rows]
        softmax.gradient(weights, targets[rows], states[:, rows], grad_logprob[rows], of_entropy, d)
        gradients.add(rows, d)
    return gradients.result()


class _Softmax:
    """From hidden states to weights, and from weights to gradients of hidden · weight, some rows at a time.

    ``states`` [4,rows]: the log-probability of the target (of id 0 if that is -100), the entropy, the LSE in two parts.
    """

    def __init__(self, head: Head):
        self.weight, self.bias, self.banned = wide(head.weight), head.bias, head.banned
        self.inner, self.outer = head.factors

    def products(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden · weight [rows,V], in ``out`` or a new tensor."""
        return multiply(wide(hidden), self.weight.T, out)

    def weights(self, x: Tensor, targets: Tensor, gaps: Tensor | None, states: Tensor) -> None:
        """Products x [rows,V] become weights in place. Fills states; the entropy only with ``gaps``, a buffer for differences
        to the largest logit."""
        if self.bias is not None:
            x += self.bias
        if self.inner != 1:
            x *= self.inner
        if self.outer is not None:
            x.tanh_().mul_(self.outer)
        x[:, self.banned] = -torch.inf
        picked, entropy, largest, log_total = states
        picked.copy_(x.gather(1, targets.clamp(min=0)[:, None])[:, 0])
        largest.copy_(x.amax(-1))
        gap = torch.sub(x, largest[:, None], out=x if gaps is None else gaps[: len(x)])
        total = torch.exp(gap, out=x).sum(-1)
        log_total.copy_(total.log())
        picked.sub_(largest).sub_(log_total)
        entropy.copy_(log_total - gap.clamp_(min=LEAST).mul_(x).sum(-1) / total) if gaps is not None else entropy.zero_()

    def gradient(
        self, weights: Tensor, targets: Tensor, states: Tensor, grad_logprob: Tensor, grad_entropy: Tensor | None, out: Tensor
    ) -> None:
        """Writes the gradient of the loss by hidden · weight to out, which may be the weights."""
        picked, entropy, largest, log_total = (state[:, None] for state in states)
        ids = targets.clamp(min=0)[:, None]
        g = torch.where(targets == -100, 0, grad_logprob)[:, None]
        of_target = g.masked_fill(targets[:, None] < 0, 0)
        if grad_entropy is None and self.outer is None:
            g, of_target = g * self.inner, of_target * self.inner
            torch.mul(weights, -g * (-log_total).exp(), out=out).scatter_add_(1, ids, of_target)
        else:
            p = weights * (-log_total).exp()
            logp = p.log().clamp_(min=LEAST).scatter_(1, ids, picked)
            coefficient = g if grad_entropy is None else g + grad_entropy[:, None] * (logp + entropy)
            torch.mul(p, -coefficient, out=out).scatter_add_(1, ids, of_target)
            if self.outer is None:
                out.mul_(self.inner)
            else:
                bend = logp.add_(largest + log_total).div_(self.outer)
                out.mul_(bend.square_().neg_().add_(1)).mul_(self.inner * self.outer)
        out[:, self.banned] = 0


class Gradients:
    """The gradients of hidden, weight and bias that are wanted, added up from those of hidden · weight, some rows at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: list[bool]):
        self.hidden, self.weight = hidden, weight
        self.dhidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        like = wide(weight.new_empty(0))
        self.dweight = like.new_zeros(weight.shape) if wanted[1] else None
        self.dbias = like.new_zeros(len(weight)) if wanted[2] else None

    def add(self, rows: slice, d: Tensor) -> None:
        """The weight's gradient is summed chunk by chunk, always in the same order."""
        factor = d.to(self.weight.dtype)
        if self.dhidden is not None:
            self.dhidden[rows] = multiply(factor, self.weight)
        if self.dweight is not None:
            add_product(self.dweight, factor.T, self.hidden[rows].to(factor.dtype))
        if self.dbias is not None:
            self.dbias += d.sum(0)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = self.hidden.dtype
        dweight, dbias = (None if grad is None else grad.to(dtype) for grad in (self.dweight, self.dbias))
        return self.dhidden, dweight, dbias
