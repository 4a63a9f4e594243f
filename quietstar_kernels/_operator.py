"""Registers operators with PyTorch's dispatcher, so that autograd, torch.func, torch.compile and fake tensors work with them.

``torch.library.custom_op`` does the same, but its layers of Python cost 40 µs per differentiable call, torch.func can't
differentiate it, and its forward-mode derivatives are silently zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from .imports import when_imported

# "quietstar"; a copy of this package under another name, as the kernels hub loads it, registers operators of its own.
NAMESPACE = __name__.partition(".")[0].removesuffix("_kernels")
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
SetupContext = Callable[[Any, tuple, Any], None]
Backward = Callable[..., tuple]
_gradients: dict[OpOverload, type[torch.autograd.Function]] = {}


def operator(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: SetupContext | None = None,
    backward: Backward | None = None,
    *,
    instead: str,
    flops: Callable[..., int] | None = None,
    changes: tuple[str, ...] = (),
) -> OpOverload:
    """Register ``quietstar::<name>``. The function gives the name, and its annotations the schema.

    Args:
        function: returns new tensors, and changes no argument but those in ``changes``.
        fake: the same for fake tensors, which have only shapes and dtypes.
        setup_context, backward: as in ``torch.autograd.Function``; without them the operator has no backward.
        instead: what has the derivatives that the operator doesn't have; part of the error that asking for one raises.
        flops: floating-point operations of its matrix products, from shapes in place of tensors, for ``FlopCounterMode``.
    """
    name = function.__name__.strip("_")
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=changes), tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if flops is not None:  # PyTorch's flop counter imports Triton and so is slow to import here
        packet = op.overloadpacket
        when_imported("torch.utils.flop_counter", lambda module: module.register_flop_formula(packet)(flops))
    _gradients[op] = Gradient = _gradient(op, function, setup_context, backward, instead)
    # Skips Function.apply, which inspects a signature in each call; only torch.func's transforms need it.
    apply: Callable[..., Any] = super(torch.autograd.Function, Gradient).apply  # type: ignore[misc]  # not in PyTorch's stub

    def autograd(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return Gradient.apply(*inputs)
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)) or forward_ad._current_level >= 0:
            return apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    LIBRARY.impl(name, autograd, "Autograd")
    return op


def _gradient(
    op: OpOverload, function: Callable[..., Any], setup_context: SetupContext | None, backward: Backward | None, instead: str
) -> type[torch.autograd.Function]:
    name, public = function.__name__.strip("_"), function.__module__.rpartition(".")[2]  # a module has one public op

    def refused(derivative: str) -> NotImplementedError:
        return NotImplementedError(f"{public} has no {derivative}: {instead}")

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            if backward is None:
                raise refused("derivative" if name == public else "second derivative")
            return backward(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise refused("forward-mode derivative")

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
            """One call after another."""
            calls = [
                Gradient.apply(
                    *(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims, strict=True))
                )
                for i in range(info.batch_size)
            ]
            if isinstance(calls[0], Tensor):
                return torch.stack(calls), 0
            return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    return Gradient


def call(op: OpOverload, *inputs: Any) -> Any:
    """``op(*inputs)``; skips the autograd layer if no derivative can be wanted, and serves torch.func's transforms."""
    if torch.compiler.is_compiling():
        return op(*inputs)
    if torch._C._are_functorch_transforms_active():
        return _gradients[op].apply(*inputs)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return op(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)
