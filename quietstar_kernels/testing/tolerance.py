"""The tolerance rule: an error is at most twice that of plain PyTorch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 2
FLOOR_ULPS = 8


def assert_close_as_plain(got: Tensor, plain: Tensor, truth: Tensor, what: str = "result", magnitude: float = 0.0) -> float:
    """Assert that the error of ``got`` is at most twice that of plain PyTorch in the same dtype.

    Both errors are the largest absolute difference from ``truth``. As a plain result may happen to be exact, a few ulps (of
    got's dtype, at the largest magnitude of the truth) are always allowed. Infinities must be the same.

    Args:
        got: the result to judge.
        plain: the same maths in plain PyTorch, with inputs of the same dtype.
        truth: the same maths in fp64, with upcast inputs.
        what: name of the result in the message.
        magnitude: of the terms that the result is a sum of, if they may cancel; the ulps are at least those of this number.

    Returns:
        The largest error as a part of what is allowed, from 0 to 1.

    Raises:
        AssertionError: the error is larger, with its place and the numbers; or the shape is wrong, or there is a NaN.
    """
    if not got.shape == plain.shape == truth.shape:
        raise AssertionError(f"{what}: got shape {list(got.shape)}, plain {list(plain.shape)}, truth {list(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach().double()
    error, plain_error = _error(got, truth), float(_error(plain, truth).max())
    if truth.isnan().any() or not math.isfinite(plain_error):
        raise AssertionError(f"{what}: truth or plain result is not finite, these inputs can't judge anything")
    magnitude = max(magnitude, float(torch.where(truth.isinf(), 0, truth).abs().max()))
    bound = FACTOR * plain_error + FLOOR_ULPS * torch.finfo(got.dtype).eps * magnitude
    worst = float(error.max())
    if worst > bound:
        place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        raise AssertionError(
            f"{what}: error {worst:.3g} at {place} of shape {list(got.shape)} exceeds {bound:.3g} by {worst - bound:.3g}: "
            f"got {got[tuple(place)].item()}, truth {truth[tuple(place)].item()}; plain errs {plain_error:.3g} at most"
        )
    return worst / bound if bound else 0.0


def _error(value: Tensor, truth: Tensor) -> Tensor:
    """Absolute difference; equal infinities differ by 0, a NaN by infinity."""
    value = value.detach().double()
    return torch.where(value == truth, 0, (value - truth).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def forward_backward(
    op: Callable[..., Any], inputs: dict[str, Any], grad_outputs: Sequence[Tensor], **options: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run ``op(**inputs, **options)`` and differentiate it.

    Args:
        op: a function that returns a tensor or several.
        inputs: tensors by argument name; those of a floating dtype get a gradient; may be None.
        grad_outputs: one for each of the first outputs, converted to its dtype; no backward if empty.
        options: further arguments.

    Returns:
        The outputs, and the gradients by input name.
    """
    leaves = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.is_floating_point()}
    for x in wanted.values():
        x.requires_grad_(len(grad_outputs) > 0)
    outputs = op(**leaves, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not grad_outputs:
        return outputs, {}
    judged = outputs[: len(grad_outputs)]
    grads = [grad.to(output.dtype) for grad, output in zip(grad_outputs, judged, strict=True)]
    result = torch.autograd.grad(judged, list(wanted.values()), grads, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in outputs], dict(zip(wanted, result, strict=True))


def assert_op_close_as_plain(
    op: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: dict[str, Any],
    grad_outputs: Sequence[Tensor] = (),
    what: str = "",
    magnitudes: dict[str, float] | None = None,
    **options: Any,
) -> float:
    """Apply ``assert_close_as_plain`` to every output and every gradient of an op.

    Args:
        op: the op to judge, called as ``op(**inputs, **options)``.
        plain: the same in plain PyTorch, called with ``inputs`` as they are, and upcast to fp64 for the truth.
        inputs: as in ``forward_backward``.
        grad_outputs: as in ``forward_backward``.
        what: name of the case in the message.
        magnitudes: by input name, of the terms of a gradient that may cancel.
        options: further arguments of both functions.

    Returns:
        The largest error as a part of what is allowed, from 0 to 1.

    Raises:
        AssertionError: as in ``assert_close_as_plain``, naming the output or gradient; or a gradient has the wrong dtype.
    """
    found = results(op, plain, inputs, grad_outputs, what, magnitudes, **options)
    return max(assert_close_as_plain(**result) for result in found)


def results(
    op: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: dict[str, Any],
    grad_outputs: Sequence[Tensor] = (),
    what: str = "",
    magnitudes: dict[str, float] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """The arguments of ``assert_close_as_plain`` for every output and gradient, from those of ``assert_op_close_as_plain``."""
    upcast = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    outputs, grads = forward_backward(op, inputs, grad_outputs, **options)
    plain_outputs, plain_grads = forward_backward(plain, inputs, grad_outputs, **options)
    true_outputs, true_grads = forward_backward(plain, upcast, [grad.double() for grad in grad_outputs], **options)
    for i, (got, like, truth) in enumerate(zip(outputs, plain_outputs, true_outputs, strict=True)):
        yield {"got": got, "plain": like, "truth": truth, "what": f"{what} output {i}".strip()}
    for name, grad in grads.items():
        title = f"{what} gradient of {name}".strip()
        if grad.dtype != inputs[name].dtype:
            raise AssertionError(f"{title}: got {grad.dtype}, want {inputs[name].dtype}")
        magnitude = (magnitudes or {}).get(name, 0.0)
        yield {"got": grad, "plain": plain_grads[name], "truth": true_grads[name], "what": title, "magnitude": magnitude}


def attention_magnitudes(inputs: dict[str, Any], grad_out: Tensor, scale: float | None = None) -> dict[str, float]:
    """Typical size of the terms that cancel in the gradients of attention, such as scale * (grad_out · v) * k.

    The gradient of a score is p * (grad_out · v - grad_out · out). In a row that sees one key it is 0, but neither term is.
    The backward computes weights again, as exp(score - lse), and may add up a score in another order than the forward did: in
    such a row too, where a weight is 1, it has the rounding error of a score.
    """
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    score = v.shape[-1] ** 0.5 * _rms(grad_out) * _rms(v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    weight = max(1.0, factor * q.shape[-1] ** 0.5 * _rms(q) * _rms(k))
    return {
        "q": factor * score * _largest(k), "k": factor * score * _largest(q), "v": weight * _largest(grad_out), "sinks": score
    }  # fmt: skip


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max()) if x.numel() else 0.0
