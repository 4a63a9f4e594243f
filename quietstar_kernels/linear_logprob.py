"""linear_logprob: log-probability of target ids under a language-model head, and entropy, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quietstar_kernels import _dispatch
from quietstar_kernels._checks import Checker, check_head

_OP = "linear_logprob"
IGNORED = -100


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
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(scale * (hidden · weightᵀ + bias)) / temperature)[target], without keeping the logits.

    Differentiable in hidden, weight and bias, also through the entropy. Banned ids leave the softmax.

    Args:
        hidden: [R,D], fp32, fp16, bf16 or fp64.
        weight: [V,D], same dtype.
        targets: int64 [R]; -100 gives log-probability 0 and no gradient.
        bias: [V].
        scale: factor on the logits.
        softcap: c; logits become c * tanh(logit / c).
        temperature: above 0.
        banned: ids that leave the softmax.
        return_entropy: also return each row's entropy, in nats.
        backend: "auto" or the name of one; a named one runs or raises.

    Returns:
        logprob [R], and with ``return_entropy`` entropy [R]; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, a target outside the vocabulary or banned
            (on CPU; on a GPU a banned target gives -inf), or a back end that can't run.
    """
    check = Checker(_OP)
    banned = check_head(check, hidden, weight, bias, scale, softcap, banned)
    check.tensor("targets", targets, "R", (torch.int64,), hidden.device)
    check.positive("temperature", temperature)
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(check, targets, banned)
    logprob, entropy, *_ = _forward(
        hidden,
        weight,
        targets,
        bias,
        scale,
        softcap,
        float(temperature),
        banned,
        return_entropy,
        _dispatch.choose(_OP, backend, hidden.device, hidden.dtype),
    )
    return (logprob, entropy) if return_entropy else logprob


def _check_targets(check: Checker, targets: Tensor, banned: list[int]) -> None:
    kept = targets[targets != IGNORED]
    outside = kept[(kept < 0) | (kept >= check["V"])]
    if outside.numel():
        raise check.fail(f"targets must be from 0 to V-1={check['V'] - 1} or -100, got {int(outside[0])}")
    for token in banned:
        if bool((kept == token).any()):
            raise check.fail(f"targets must not hold a banned id, got {token}")


@torch.library.custom_op("quietstar::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: Sequence[int],
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy and, for the backward, the LSE of the logits in two parts, as ``reference.linear_logprob``."""
    return _dispatch.run(
        "linear_logprob", backend, hidden, weight, targets, bias, scale, softcap, temperature, list(banned), return_entropy
    )


@_forward.register_fake
def _(hidden, weight, targets, bias, scale, softcap, temperature, banned, return_entropy, backend):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=wide) for _ in range(4))


@torch.library.custom_op("quietstar::linear_logprob_backward", mutates_args=())
def _backward(
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
    banned: Sequence[int],
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those that aren't ``wanted`` are empty."""
    grads = _dispatch.run(
        "linear_logprob_backward",
        backend,
        grad_logprob,
        grad_entropy,
        hidden,
        weight,
        targets,
        bias,
        entropy,
        largest,
        log_total,
        scale,
        softcap,
        temperature,
        list(banned),
        list(wanted),
    )
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return dhidden, dweight, dbias


@_backward.register_fake
def _(
    grad_logprob,
    grad_entropy,
    hidden,
    weight,
    targets,
    bias,
    entropy,
    largest,
    log_total,
    scale,
    softcap,
    temperature,
    banned,
    wanted,
    backend,
):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, bias, scale, softcap, temperature, banned, ctx.return_entropy, ctx.backend = inputs
    ctx.options = (scale, softcap, temperature, banned)
    ctx.save_for_backward(hidden, weight, targets, bias, *output[1:])


def _autograd(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, *_: Tensor) -> tuple:
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]  # hidden, weight, bias
    grad_entropy_or_none = grad_entropy if ctx.return_entropy else None
    grads = _backward(grad_logprob, grad_entropy_or_none, *ctx.saved_tensors, *ctx.options, wanted, ctx.backend)
    dhidden, dweight, dbias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return dhidden, dweight, None, dbias, *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)
