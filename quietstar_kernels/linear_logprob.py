"""linear_logprob: log-probabilities of target ids under a language-model head, and entropies, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from ._options import Head, Saved
from .checks import Checker, check_head, check_targets, under_autocast

_OP = "linear_logprob"
GPU_PART = 16  # a call may keep a sixteenth of a GPU's memory, since several may wait for their backward


def default_keep_bytes(device: torch.device) -> int:
    """Bytes of logits that a call on ``device`` keeps at most for its backward, if it isn't told: 1/16 of a GPU's memory, on a
    CPU 256 MiB.

    Of all its memory, not of what is free, so that the bits of the gradients don't depend on the moment.
    """
    return _memory(device) // GPU_PART if device.type == "cuda" else 2**28


default_keep_bytes._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it instead of tracing it


@functools.cache
def _memory(device: torch.device) -> int:
    total: int = torch.cuda.get_device_properties(device).total_memory
    return total


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., temperature: float = ..., banned: Sequence[int] = ...,
    return_entropy: Literal[False] = ..., backend: str = ..., *, keep_bytes: int | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., temperature: float = ..., banned: Sequence[int] = ...,
    *, return_entropy: Literal[True], backend: str = ..., keep_bytes: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., temperature: float = ..., banned: Sequence[int] = ...,
    return_entropy: bool = ..., backend: str = ..., *, keep_bytes: int | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


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
    keep_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(scale * (hidden · weightᵀ + bias)) / temperature)[target], holding all logits only if they fit.

    Differentiable in hidden, weight and bias, also through the entropy, in the ways that ``thought_attention`` is. Banned ids
    are left out of the softmax.

    A logit of NaN or inf makes the results of its row NaN, and no other row's; banned ids don't count, nor does what a soft cap
    makes finite. A logit of -inf under a soft cap is -softcap, or stays -inf, depending on the back end. The log-probability of
    a target of -100 stays 0. A row of which all logits are -inf has no defined result.

    If the logits fit ``keep_bytes``, a forward that may be differentiated keeps them until its backward, and both take three
    matrix products. Otherwise the backward computes them again, a fourth product, which changes gradients by rounding.

    Memory, besides arguments, results and what is kept:

    - On a GPU a chunk of 2^24 logits in fp32, 64 MiB. For each row the backward also takes D numbers in fp32, and 8192 in the
      dtype of hidden, or 2^24 in all if that is more. A million rows of width 4096 in bf16 take 33 GB; several calls, each for
      some of the rows and with its backward before the next, take less.
    - On a CPU a few chunks of up to 2^24 logits in fp32, or of one row, and for 16-bit inputs fp32 copies of weight and of its
      gradient, however many rows there are.
    - The back end "reference" holds all logits several times.

    Args:
        hidden: [R,D], fp32, fp16, bf16 or fp64.
        weight: [V,D], same dtype. Under autocast other dtypes are cast to its dtype; without a cast, fp32 is computed in fp32.
        targets: int64 [R]; -100 gives log-probability 0 and no gradient.
        bias: [V].
        scale: factor on the logits.
        softcap: c; logits become c * tanh(logit / c).
        temperature: above 0 and at most fp32's largest.
        banned: ids that are left out of the softmax.
        return_entropy: also return the entropy of each row, in nats.
        backend: "auto", or the name of one, which runs or raises.
        keep_bytes: how many bytes of logits each forward may keep for its backward; 0 keeps none. Default 1/16 of all memory of
            the GPU, and 256 MiB on a CPU. A logit takes as many bytes as an element of hidden, on CPU at least 4.

    Returns:
        logprob [R], and with ``return_entropy`` entropy [R]; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, a target outside the vocabulary or banned
            (on CPU; on a GPU a banned target gives -inf), or a back end that can't run.
    """
    check = Checker(_OP)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    scale, softcap, bans = check_head(check, hidden, weight, bias, scale, softcap, banned)
    check.tensor("targets", targets, "R", (torch.int64,), hidden.device, "hidden")
    scale, softcap = check.in_fp32("scale", scale), check.in_fp32("softcap", softcap)
    temperature = check.temperature(temperature)
    check.flag("return_entropy", return_entropy)
    if keep_bytes is not None:
        keep_bytes = check.integer("keep_bytes", keep_bytes, 0)
    check_targets(check, targets, bans)
    backend = _dispatch.choose(_OP, backend, hidden.device, hidden.dtype)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    keep = differentiable and backend != "reference" and _fits(hidden, check["V"], keep_bytes, backend)
    inputs = (hidden, weight, targets, bias, scale, softcap, temperature, bans)
    logprob, entropy, *_ = call(_forward, *inputs, return_entropy, keep, backend)
    return (logprob, entropy) if return_entropy else logprob


def _fits(hidden: Tensor, vocabulary: int, keep_bytes: int | None, backend: str) -> bool:
    """Whether the logits may be kept; False if torch.compile doesn't know the number of rows."""
    itemsize = _wide(hidden).itemsize if backend == "cpu" else hidden.dtype.itemsize
    keep_bytes = default_keep_bytes(hidden.device) if keep_bytes is None else keep_bytes
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
    return *states, *((kept, kept_rows) if keep else _nothing(hidden))


def _fake(hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, keep, backend = options
    states = (hidden.new_empty(hidden.shape[:1], dtype=_wide(hidden)) for _ in range(4))
    kept = _dispatch.module(_OP, backend).empty_kept(hidden, weight) if keep else _nothing(hidden)
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
    grads = _dispatch.run(f"{_OP}_backward", backend, grad_logprob, grad_entropy, hidden, head, targets, saved, list(wanted))
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return dhidden, dweight, dbias


def _fake_backward(grad_logprob: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple:
    *_, wanted, _backend = rest
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


def _flops_backward(grad_logprob: Any, grad_entropy: Any, hidden: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Those of ``linear``; logits that were not kept are no useful product."""
    return sum(rest[-2][:2]) * _flops(hidden, weight)


def _nothing(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(0), hidden.new_empty(0)


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


_INSTEAD = "quietstar_kernels.testing.plain_logprob has all, in dense PyTorch"
_backward = operator(_linear_logprob_backward, _fake_backward, instead=_INSTEAD, flops=_flops_backward)
_forward = operator(_linear_logprob, _fake, _setup_context, _autograd, instead=_INSTEAD, flops=_flops)
