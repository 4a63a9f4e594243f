"""linear_divergence: the divergence of a student's language-model head from a teacher's, forward and backward.

Plain PyTorch for any device, some rows at a time. The backward computes the logits of both again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._operator import call, operator
from ._options import Head
from .checks import FLOATS, Checker, check_head, under_autocast
from .cpu._head import chunk_rows
from .cpu.linear_logprob import Gradients
from .cpu.products import multiply
from .reference import wide

GPU_LOGITS = 2**25  # in one chunk: 128 MiB of fp32


def linear_divergence(
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
    """The divergence of a student's next-token distribution from a teacher's for each row, in nats, without all logits.

    With S and T the softmax of softcap(scale * (hidden · weightᵀ + bias)) / temperature of the two, a ``beta`` of

    - 0 is the forward KL divergence, KL(T ‖ S),
    - 1 is the reverse KL divergence, KL(S ‖ T),
    - between them is the generalized Jensen-Shannon divergence, beta KL(T ‖ M) + (1 - beta) KL(S ‖ M) with M = beta T +
      (1 - beta) S (arXiv 2306.13649, equation 1), which would be 0 at both ends. TRL's trainers have the same convention.

    Differentiable in the student's hidden, weight and bias. The teacher is a constant: nothing of it gets a gradient.

    A logit of NaN or inf makes the result of its row NaN, and no other row's. A logit of -inf has probability 0; where that
    makes a divergence infinite, its gradients are not defined.

    Both forward and backward hold chunks of at most 2^25 logits on a GPU and 2^24 on a CPU, or of one row, about six of them at
    a time in fp32. The backward computes logits again, and sums the gradients of weight and bias in fp32. For 16-bit inputs a
    CPU also takes fp32 copies of both weights.

    Args:
        hidden: the student's, [R,D], fp32, fp16, bf16 or fp64.
        weight: [V,D], same dtype. Under autocast other dtypes are cast to its dtype.
        teacher_hidden: [R,D'], of these dtypes; neither width nor dtype need be the student's.
        teacher_weight: [V,D'], dtype of teacher_hidden. If one vocabulary has more padding, pass the first V rows of it.
        beta: from 0 to 1.
        bias, teacher_bias: [V].
        scale, teacher_scale: factors on the logits.
        softcap, teacher_softcap: c; logits become c * tanh(logit / c).
        temperature: of both, above 0 and at most fp32's largest.

    Returns:
        [R], fp32 (fp64 if the student's inputs are).

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range.
    """
    check = Checker("linear_divergence")
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = under_autocast(teacher_hidden, teacher_weight, teacher_bias)
    scale, softcap, _ = check_head(check, hidden, weight, bias, scale, softcap, ())
    check.tensor("teacher_hidden", teacher_hidden, "R,D'", FLOATS, hidden.device, "hidden")
    given = teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap
    teacher_scale, teacher_softcap, _ = check_head(check, *given, (), "teacher_", "D'")
    scale, softcap = check.in_fp32("scale", scale), check.in_fp32("softcap", softcap)
    check.in_fp32("teacher_scale", teacher_scale)
    check.in_fp32("teacher_softcap", teacher_softcap)
    temperature, beta = check.temperature(temperature), check.fraction("beta", beta)
    own = Head(weight, bias, scale, softcap, temperature, [])
    factors = own.factors + own._replace(scale=teacher_scale, softcap=teacher_softcap).factors
    teacher = (None if x is None else x.detach() for x in (teacher_hidden, teacher_weight, teacher_bias))
    divergence: Tensor = call(_forward, hidden, weight, bias, *teacher, *factors, beta)
    return divergence


def _linear_divergence(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    inner: float, outer: float | None, teacher_inner: float, teacher_outer: float | None, beta: float,
) -> Tensor:  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        student = _Head(hidden, weight, bias, inner, outer)
        teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, teacher_inner, teacher_outer)
        result = hidden.new_empty(len(hidden), dtype=student.dtype)
        for rows in _chunks(hidden, len(weight)):
            s, t = student.log_probs(rows)[0], teacher.log_probs(rows)[0].to(student.dtype)
            if beta in (0, 1):
                result[rows] = _terms(*((s, t) if beta else (t, s))).sum(-1)
            else:
                m = _mixture(s, t, beta)
                result[rows] = _terms(t, m).sum(-1).mul_(beta).add_(_terms(s, m).sum(-1), alpha=1 - beta)
        return result


def _linear_divergence_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    inner: float, outer: float | None, teacher_inner: float, teacher_outer: float | None, beta: float, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; those that aren't ``wanted`` are empty."""
    with torch.autocast(hidden.device.type, enabled=False):
        student = _Head(hidden, weight, bias, inner, outer)
        teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, teacher_inner, teacher_outer)
        gradients = Gradients(hidden, student.weight, list(wanted))
        for rows in _chunks(hidden, len(weight)):
            s, bend = student.log_probs(rows)
            d = _gradient(s, teacher.log_probs(rows)[0].to(s.dtype), beta)
            del s
            d *= grad[rows, None].to(d.dtype) * (inner if outer is None else inner * outer)
            if bend is not None:
                d *= bend.square_().neg_().add_(1)
            gradients.add(rows, d)
        dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in gradients.result())
        return dhidden, dweight, dbias


class _Head:
    """Hidden states and a head. On a GPU factors stay as they are and their products are fp32, else all is fp32 (or fp64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, inner: float, outer: float | None):
        self.hidden, self.bias, self.inner, self.outer = hidden, bias, inner, outer
        self.weight = weight if weight.is_cuda else wide(weight)
        self.dtype = wide(hidden.new_empty(0)).dtype

    def log_probs(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [rows,V], and with a soft cap the tanh of the logits."""
        x, bend = multiply(self.hidden[rows].to(self.weight.dtype), self.weight.T), None
        if self.bias is not None:
            x += self.bias
        x *= self.inner
        if self.outer is not None:
            bend = x.tanh_()
            x = bend * self.outer
        return torch.log_softmax(x, -1), bend


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    rows = len(hidden)
    step = chunk_rows(rows, vocabulary) if hidden.device.type == "cpu" else GPU_LOGITS // vocabulary
    return [slice(start, start + step) for start in range(0, rows, max(step, 1))]


def _mixture(s: Tensor, t: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))


def _terms(p: Tensor, q: Tensor) -> Tensor:
    """exp(p) (p - q), of which KL is the sum; 0 where exp(p) is 0."""
    weights = p.exp()
    return (p - q).masked_fill_(weights == 0, 0).mul_(weights)


def _gradient(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Of the divergence by the student's final logits."""
    if beta == 0:
        return s.exp().sub_(t.exp())
    terms = _terms(s, t if beta == 1 else _mixture(s, t, beta))
    terms -= s.exp().mul_(terms.sum(-1, keepdim=True))
    return terms if beta == 1 else terms.mul_(1 - beta)


def _fake(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def _fake_backward(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if want else 0) for shape, want in zip(shapes, rest[-1], strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    wanted = list(ctx.needs_input_grad[:3])
    grads = call(_backward, grad, *ctx.saved_tensors, *ctx.options, wanted)
    return *(x if want else None for x, want in zip(grads, wanted, strict=True)), *[None] * 8


_INSTEAD = "quietstar_kernels.testing.plain_divergence has all, in dense PyTorch"
_backward = operator(_linear_divergence_backward, _fake_backward, instead=_INSTEAD)
_forward = operator(_linear_divergence, _fake, _setup_context, _autograd, instead=_INSTEAD)
