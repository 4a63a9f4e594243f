"""A model's own linear layers through the library that ``quietstar_kernels.cpu.products`` chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quietstar_kernels.checks import instance
from quietstar_kernels.cpu import products


def fast_linear(model: nn.Module) -> None:
    """Send a model's large fp32 products, forward and backward, to oneDNN on AMD processors with AVX-512, where it is faster
    than PyTorch's matmul.

    Rounding differs. Nothing changes on other processors or a GPU, for other dtypes, with autocast, inside ``torch.compile``,
    nor for layers that aren't ``torch.nn.Linear`` itself; those inside LoRA's are. QUIETSTAR_CPU_MATMUL=onednn, both or
    pytorch overrides the choice by processor.

    Args:
        model: changed in place, but for its weights and their names.

    Raises:
        ValueError: a model that isn't a ``torch.nn.Module``.
    """
    instance("fast_linear: model", model, nn.Module)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear  # its state, hooks and copies stay as they are


class FastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        plain = (
            x.device.type != "cpu"
            or torch.compiler.is_compiling()
            or not products.through_onednn(x, self.out_features)
            or weight.dtype != x.dtype
            or type(weight) is not nn.Parameter
            or torch.is_autocast_enabled("cpu")
        )
        return F.linear(x, weight, bias) if plain else OneDNNLinear.apply(x, weight, bias)


class OneDNNLinear(torch.autograd.Function):
    """``torch.nn.functional.linear``, forward by oneDNN and backward by the library of each product."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return products.onednn_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        # A derivative of the gradient is PyTorch's to take.
        multiply = torch.mm if torch.is_grad_enabled() else products.multiply
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = None if weight is None else multiply(rows, weight).view(*grad.shape[:-1], -1)
        of_weight = None if x is None else multiply(rows.T, x.reshape(-1, x.shape[-1]))
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
