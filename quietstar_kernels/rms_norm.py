"""rms_norm: the norm before each part of a decoder layer, with the sum that it is taken of, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from .checks import FLOATS, Checker
from .reference import wide

_OP = "rms_norm"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    delta: Tensor | None = None,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """total = x + delta, and total / sqrt(mean(total²) + eps) * (offset + weight) (arXiv 1910.07467).

    Differentiable in x, delta and weight, through both results, in the ways that ``thought_attention`` is; it keeps the total
    and a number for each row for that. Deterministic: two runs on one machine agree bitwise. Computed in fp32 (fp64 for fp64
    inputs) from the total in x's dtype.

    Args:
        x: [...,D], fp32, fp16, bf16 or fp64.
        weight: [D], of any of these dtypes, as is delta.
        eps: zero or above.
        delta: [...,D], what the part of the layer before adds to x.
        offset: 1 where the model keeps weights less 1, as Gemma does.
        dtype: of the norm; default x's.
        backend: "auto", or the name of one, which runs or raises.

    Returns:
        total [...,D] in x's dtype, which is x itself without a delta, and its norm [...,D].

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check = Checker(_OP)
    check.tensor("x", x, "...", FLOATS)
    D = x.shape[-1] if x.ndim else 0
    if D == 0:
        raise check.fail(f"x must have shape [...,D] with D of at least 1, got {list(x.shape)}")
    check.sizes["D"] = D
    check.tensor("weight", weight, "D", FLOATS, x.device, "x")
    if delta is not None:
        check.tensor("delta", delta, "...", FLOATS, x.device, "x")
        if delta.shape != x.shape:
            raise check.fail(f"delta must have the shape of x, {list(x.shape)}, got {list(delta.shape)}")
    eps, offset = check_norm(check, eps, offset)
    if dtype is not None and dtype not in FLOATS:
        raise check.fail(f"dtype must be None or one of float32, float16, bfloat16, float64, got {dtype}")
    backend = _dispatch.choose(_OP, backend, x.device, x.dtype, D=D)
    total, out, _ = call(_forward, x, delta, weight, eps, offset, dtype or x.dtype, backend)
    return x if delta is None else total, out


def check_norm(check: Checker, eps: float, offset: float) -> tuple[float, float]:
    found = check.finite_or_none("offset", offset)
    if found is None:
        raise check.fail("offset must be finite, got None")
    return check.in_fp32("eps", check.positive("eps", eps, zero=True)), check.in_fp32("offset", found)


def _rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The total, which is empty without a delta; the norm; and 1 / sqrt(mean(total²) + eps) [...]."""
    total, out, rstd = _dispatch.run(_OP, backend, x, delta, weight, eps, offset, dtype)
    return x.new_empty(0) if delta is None else total, out, rstd


def _fake(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if delta is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), wide(x).new_empty(x.shape[:-1])


def _rms_norm_backward(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor, offset: float,
    delta: torch.dtype, needs_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x; of the delta, empty where it has x's dtype and so x's gradient; and of weight, empty if not needed."""
    dx, ddelta, dweight = _dispatch.run(
        f"{_OP}_backward", backend, grad_out, grad_total, total, rstd, weight, offset, delta, needs_weight
    )
    return tuple(dx.new_empty(0) if y is None else y for y in (dx, ddelta, dweight))  # type: ignore[return-value]


def _fake_backward(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor, offset: float,
    delta: torch.dtype, needs_weight: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ddelta = total.new_empty(0 if delta == total.dtype else total.shape, dtype=delta)
    return total.new_empty(total.shape), ddelta, weight.new_empty(weight.shape if needs_weight else 0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, delta, weight, _, ctx.offset, _, ctx.backend = inputs
    total, _, rstd = output
    ctx.delta = x.dtype if delta is None else delta.dtype
    ctx.mark_non_differentiable(*((total, rstd) if delta is None else (rstd,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if delta is None else total, rstd, weight)


def _autograd(ctx: Any, grad_total: Tensor | None, grad_out: Tensor | None, _: None) -> tuple:
    total, rstd, weight = ctx.saved_tensors
    rest = None, None, None, None
    if grad_out is None:
        return grad_total, None if grad_total is None else grad_total.to(ctx.delta), None, *rest
    needs_weight = ctx.needs_input_grad[2]
    dx, ddelta, dweight = call(
        _backward, grad_out, grad_total, total, rstd, weight, ctx.offset, ctx.delta, needs_weight, ctx.backend
    )
    needs_delta = ctx.needs_input_grad[1]
    ddelta = None if not needs_delta else dx if ctx.delta == dx.dtype else ddelta
    return dx, ddelta, dweight if needs_weight else None, *rest


_INSTEAD = "quietstar_kernels.testing.plain_norm has all"
_backward = operator(_rms_norm_backward, _fake_backward, instead=_INSTEAD)
_forward = operator(_rms_norm, _fake, _setup_context, _autograd, instead=_INSTEAD)
