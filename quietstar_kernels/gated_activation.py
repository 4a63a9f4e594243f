"""gated_activation: what stands between the two products of a gated feed-forward layer (arXiv 2002.05202), and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from .checks import FLOATS, Checker

_OP = "gated_activation"


def gated_activation(gate: Tensor, up: Tensor | None = None, activation: str = "silu", backend: str = "auto") -> Tensor:
    """activation(gate) * up.

    Differentiable in gate and up, in the ways that ``thought_attention`` is; it keeps its inputs for that. Computed in fp32
    (fp64 for fp64 inputs).

    Args:
        gate: [...,I], fp32, fp16, bf16 or fp64; without up [...,2I], the gate first.
        up: [...,I], same dtype.
        activation: "silu", or "gelu_tanh", GELU by its approximation with tanh.
        backend: "auto", or the name of one, which runs or raises.

    Returns:
        [...,I] in gate's dtype.

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check = Checker(_OP)
    check.tensor("gate", gate, "...", FLOATS)
    if gate.ndim == 0:
        raise check.fail("gate must have shape [...,I], got []")
    if up is None:
        if gate.shape[-1] % 2:
            raise check.fail(f"gate must have shape [...,2I] without up, got {list(gate.shape)}")
    else:
        check.tensor("up", up, "...", (gate.dtype,), gate.device, "gate")
        if up.shape != gate.shape:
            raise check.fail(f"up must have the shape of gate, {list(gate.shape)}, got {list(up.shape)}")
    activation = check.choice("activation", activation, ("silu", "gelu_tanh"))
    return call(_forward, gate, up, activation, _dispatch.choose(_OP, backend, gate.device, gate.dtype))


def _gated_activation(gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    return _dispatch.run(_OP, backend, gate, up, activation)


def _fake(gate: Tensor, up: Tensor | None, *_: Any) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1)))


def _gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, the second empty where both are in the first."""
    dgate, dup = _dispatch.run(f"{_OP}_backward", backend, grad, gate, up, activation)
    return dgate, gate.new_empty(0) if dup is None else dup


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    gate, up = ctx.saved_tensors
    dgate, dup = call(_backward, grad, gate, up, ctx.activation, ctx.backend)
    return dgate, None if up is None else dup, None, None


_INSTEAD = "quietstar_kernels.testing.plain_gated has all"
_backward = operator(_gated_activation_backward, _fake_backward, instead=_INSTEAD)
_forward = operator(_gated_activation, _fake, _setup_context, _autograd, instead=_INSTEAD)
