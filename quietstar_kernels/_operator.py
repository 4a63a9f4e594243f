"""Registers operators with PyTorch's dispatcher, so that autograd, torch.compile and fake tensors work with them.

``torch.library.custom_op`` does the same, but its layers of Python cost 40 µs per differentiable call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

LIBRARY = torch.library.Library("quietstar", "FRAGMENT")
SetupContext = Callable[[Any, tuple, Any], None]
Backward = Callable[..., tuple]


def operator(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: SetupContext | None = None,
    backward: Backward | None = None,
) -> OpOverload:
    """Register ``quietstar::<name>``. The function gives the name, and its annotations the schema.

    Args:
        function: returns new tensors and changes no argument.
        fake: the same for fake tensors, which have only shapes and dtypes.
        setup_context, backward: as in ``torch.autograd.Function``; without them the operator has no backward.
    """
    name = function.__name__.strip("_")
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quietstar::{name}", fake, lib=LIBRARY)
    op: OpOverload = getattr(torch.ops.quietstar, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            if backward is None:
                raise RuntimeError(f"{name} has no gradient")
            return backward(ctx, *grads)

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Gradient.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    LIBRARY.impl(name, autograd, "Autograd")
    return op


def call(op: OpOverload, *inputs: Any) -> Any:
    """``op(*inputs)``; skips the autograd layer if gradients are off."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)
