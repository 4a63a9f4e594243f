"""linear_logprob: log-probabilities of target ids under a language-model head, and entropies, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quietstar_kernels import _dispatch
from quietstar_kernels._checks import IGNORED, Checker, check_head, check_targets
from quietstar_kernels._operator import call, operator
from quietstar_kernels._options import Head, Saved

_OP = "linear_logprob"
KEEP_BYTES = 2**28
TOLERANCE = 1e-4


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
    return_entropy: bool = False,
    backend: str = "auto",
    *,
    grad_scale: Tensor | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(scale * (hidden · weightᵀ + bias)) / temperature)[target], in bounded memory.

    Differentiable in hidden, weight and bias, also through the entropy, in the ways that ``thought_attention`` is. Banned ids
    are left out of the softmax.

    A logit of NaN or inf makes the results of its row NaN, and no other row's; banned ids don't count, nor does what a soft cap
    makes finite. A logit of -inf under a soft cap is -softcap, or stays -inf, depending on the back end. The log-probability of
    a target of -100 stays 0. A row of which all logits are -inf has no defined result.

    If the logits fit ``keep_bytes``, the forward keeps them, and forward and backward take three matrix products. Otherwise
    the backward computes them again, which is a fourth product. With ``grad_scale`` there are three products and no logits are
    kept: the forward computes the gradients of hidden, weight and bias, and the backward multiplies them by one number.

    Args:
        hidden: [R,D], fp32, fp16, bf16 or fp64.
        weight: [V,D], same dtype.
        targets: int64 [R]; -100 gives log-probability 0 and no gradient.
        bias: [V].
        scale: factor on the logits.
        softcap: c; logits become c * tanh(logit / c).
        temperature: above 0.
        banned: ids that are left out of the softmax.
        return_entropy: also return the entropy of each row, in nats.
        backend: "auto", or the name of one, which runs or raises.
        grad_scale: the gradient of the loss with respect to the log-probabilities [R], or with ``return_entropy`` to
            log-probabilities and entropies [2,R], up to one factor for all rows; for example, -1/R for a mean loss. fp32
            (fp64 for fp64 inputs). Gradients are rounded to hidden's dtype at this scale, so include a loss scale. If the
            backward gets another gradient, it raises a ValueError on CPU, and makes all gradients NaN on a GPU.
        keep_bytes: how many bytes of logits a forward may keep for its backward, 256 MiB by default; 0 keeps none. A logit
            takes as many bytes as an element of hidden, on CPU at least 4. With ``grad_scale`` a GPU holds this many during
            the forward, or the logits of D rows if those are more.

    Returns:
        logprob [R], and with ``return_entropy`` entropy [R]; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, a target outside the vocabulary or banned
            (on CPU; on a GPU a banned target gives -inf), or a back end that can't run.
    """
    check = Checker(_OP)
    scale, softcap, bans = check_head(check, hidden, weight, bias, scale, softcap, banned)
    check.tensor("targets", targets, "R", (torch.int64,), hidden.device, "hidden")
    temperature = check.positive("temperature", temperature)
    check.flag("return_entropy", return_entropy)
    if grad_scale is not None:
        check.tensor("grad_scale", grad_scale, "2,R" if return_entropy else "R", (_wide(hidden),), hidden.device)
    keep_bytes = check.integer("keep_bytes", keep_bytes, 0)
    check_targets(check, targets, bans)
    backend = _dispatch.choose(_OP, backend, hidden.device, hidden.dtype)
    inputs = (hidden, weight, targets, bias, scale, softcap, temperature, bans)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if grad_scale is not None and any(wanted):
        promised = grad_scale.detach() if return_entropy else grad_scale.detach()[None]
        logprob, entropy, *_ = call(_joined, promised, *inputs, wanted, keep_bytes, backend)
    else:
        keep = any(wanted) and backend != "reference" and _fits(hidden, check["V"], keep_bytes, backend)
        logprob, entropy, *_ = call(_forward, *inputs, return_entropy, keep, backend)
    return (logprob, entropy) if return_entropy else logprob


def _fits(hidden: Tensor, vocabulary: int, keep_bytes: int, backend: str) -> bool:
    """Whether the logits may be kept; False if torch.compile doesn't know the number of rows."""
    itemsize = _wide(hidden).itemsize if backend == "cpu" else hidden.dtype.itemsize
    fits = hidden.shape[0] * vocabulary * itemsize <= keep_bytes
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import

        return guard_or_false(fits)
    return fits


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: Sequence[int],
    return_entropy: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The log-probability and the fields of ``Saved``, the last two empty if nothing is kept."""
    head = Head(weight, bias, scale, softcap, temperature, list(banned))
    *states, kept, kept_rows = _dispatch.run(_OP, backend, hidden, head, targets, return_entropy, keep)
    return *states, *((kept, kept_rows) if keep else _nothing(hidden, 2))


def _fake(hidden, weight, targets, bias, scale, softcap, temperature, banned, return_entropy, keep, backend):
    states = (hidden.new_empty(hidden.shape[:1], dtype=_wide(hidden)) for _ in range(4))
    kept = _dispatch.module(_OP, backend).empty_kept(hidden, weight) if keep else _nothing(hidden, 2)
    return *states, *kept


def _linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    largest: Tensor,
    log_total: Tensor,
    kept: Tensor | None,
    kept_rows: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: Sequence[int],
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those that aren't ``wanted`` are empty."""
    head = Head(weight, bias, scale, softcap, temperature, list(banned))
    saved = Saved(entropy, largest, log_total, kept, kept_rows)
    given = (grad_logprob, grad_entropy, hidden, head, targets, saved, list(wanted))
    return _present(hidden, _dispatch.run(f"{_OP}_backward", backend, *given))


def _fake_backward(grad_logprob, grad_entropy, hidden, weight, *arguments):
    return _fake_gradients(hidden, weight, arguments[-2])


def _linear_logprob_joined(
    promised: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: Sequence[int],
    wanted: Sequence[bool],
    keep_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, and the gradients for ``promised`` [1 or 2,R]; those that aren't ``wanted`` are empty."""
    grad_logprob, grad_entropy = promised[0].contiguous(), promised[1].contiguous() if len(promised) == 2 else None
    head = Head(weight, bias, scale, softcap, temperature, list(banned))
    given = (grad_logprob, grad_entropy, hidden, head, targets, list(wanted), keep_bytes)
    logprob, entropy, *grads = _dispatch.run(f"{_OP}_joined", backend, *given)
    return logprob, entropy, *_present(hidden, grads)


def _fake_joined(promised, hidden, weight, targets, bias, scale, softcap, temperature, banned, wanted, keep_bytes, backend):
    states = (hidden.new_empty(hidden.shape[:1], dtype=_wide(hidden)) for _ in range(2))
    return *states, *_fake_gradients(hidden, weight, wanted)


def _linear_logprob_rescale(
    promised: Tensor, came: Tensor, targets: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times the factor between ``promised`` and the gradient that ``came``, [1 or 2,R]; NaN if there is none.

    The factor is that of the largest ``promised``. Log-probabilities of rows whose target is -100 don't count.
    """
    counts = torch.ones_like(promised, dtype=torch.bool)
    counts[0] = targets != IGNORED
    promised, came = (torch.where(counts, x, 0).flatten() for x in (promised, came))
    if promised.numel() == 0:
        return dhidden.clone(), dweight.clone(), dbias.clone()
    largest = promised.abs().argmax(0, keepdim=True)
    factor = torch.where(promised[largest] == 0, 0, came[largest] / promised[largest])
    kept_promise = ((came - factor * promised).abs() <= TOLERANCE * (factor * promised).abs()).all()
    if promised.device.type == "cpu" and not kept_promise and came.isfinite().all():  # a loss scaler handles an overflow
        raise ValueError(f"{_OP}: grad_scale must be the gradient that comes back, up to one factor for all rows")
    factor = torch.where(kept_promise, factor, torch.nan)
    dhidden, dweight, dbias = (grad * factor[0] for grad in (dhidden, dweight, dbias))
    return dhidden, dweight, dbias


def _fake_rescale(promised, came, targets, dhidden, dweight, dbias):
    return torch.empty_like(dhidden), torch.empty_like(dweight), torch.empty_like(dbias)


def _nothing(hidden: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(0) for _ in range(count))


def _present(hidden: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return dhidden, dweight, dbias


def _fake_gradients(hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, bias, *ctx.options, ctx.return_entropy, ctx.keep, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2 if ctx.return_entropy else 1 :])
    ctx.set_materialize_grads(False)  # no zeros for what is kept
    ctx.save_for_backward(hidden, weight, targets, bias, *output[1:4], *(output[4:] if ctx.keep else (None, None)))


def _autograd(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: Tensor) -> tuple:
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]  # hidden, weight, bias
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(ctx.saved_tensors[4])
    grads = call(
        _backward,
        grad_logprob,
        grad_entropy if ctx.return_entropy else None,
        *ctx.saved_tensors,
        *ctx.options,
        wanted,
        ctx.backend,
    )
    dhidden, dweight, dbias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return dhidden, dweight, None, dbias, *[None] * 7


def _setup_joined(ctx: Any, inputs: tuple, output: tuple) -> None:
    promised, _, _, targets, *_ = inputs
    ctx.mark_non_differentiable(*output[len(promised) : 2])  # not the gradients: theirs are refused, where constants are zero
    ctx.set_materialize_grads(False)  # no zeros for the gradients
    ctx.save_for_backward(promised, targets, *output[2:])


def _autograd_joined(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple:
    promised, targets, *grads = ctx.saved_tensors
    came = [torch.zeros_like(promised[0]) if x is None else x for x in (grad_logprob, grad_entropy)]
    grads = call(_rescale, promised, torch.stack(came[: len(promised)]), targets, *grads)
    wanted = [ctx.needs_input_grad[i] for i in (1, 2, 4)]
    dhidden, dweight, dbias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return None, dhidden, dweight, None, dbias, *[None] * 7


_INSTEAD = "quietstar_kernels.testing.plain_logprob has all, in dense PyTorch"
_backward = operator(_linear_logprob_backward, _fake_backward, instead=_INSTEAD)
_rescale = operator(_linear_logprob_rescale, _fake_rescale, instead=_INSTEAD)
_forward = operator(_linear_logprob, _fake, _setup_context, _autograd, instead=_INSTEAD)
_joined = operator(_linear_logprob_joined, _fake_joined, _setup_joined, _autograd_joined, instead=_INSTEAD)
