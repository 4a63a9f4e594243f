"""gated_activation: a program takes a block of rows and columns.

Both activations are x * sigmoid(z): z = x for SiLU, and twice the argument of the tanh for GELU, since (1 + tanh(z/2)) / 2 is
sigmoid(z).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, as_rows, cdiv, plan
from .configs import Config

TILE = 1024
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Implements ``reference.gated_activation``."""
    width = gate.shape[-1] // (2 if up is None else 1)
    out = gate.new_empty(*gate.shape[:-1], width)
    if out.numel():
        _launch("gated", _gated, width, activation, (gate, up), out)
    return out


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """Implements ``reference.gated_activation_backward``."""
    dgate, dup = gate.new_empty(gate.shape), None if up is None else gate.new_empty(gate.shape)
    if dgate.numel():
        _launch("gated_backward", _gated_backward, grad.shape[-1], activation, (gate, up, grad), dgate, dup)
    return dgate, dup


def _launch(
    name: str, kernel: Any, width: int, activation: str, inputs: tuple[Tensor | None, ...], *outputs: Tensor | None
) -> None:
    rows = tuple(None if x is None else as_rows(x) for x in inputs)
    config, known = _config(width), plan(name, rows, activation)

    def prepare() -> Launch:
        R, strides = max(len(x) for x in rows if x is not None), (0 if x is None else x.stride(0) for x in rows)
        grid = cdiv(R, config.blocks["BLOCK_R"]) * cdiv(width, config.blocks["BLOCK_I"])
        return Launch(kernel, (grid,), (R, width, *strides), {"GELU": activation == "gelu_tanh"})

    known.launch(name, config, (*rows, *outputs), prepare)


@functools.cache
def _config(width: int) -> Config:
    BLOCK_I = min(TILE, triton.next_power_of_2(width))
    return Config({"BLOCK_R": TILE // BLOCK_I, "BLOCK_I": BLOCK_I})


@triton.jit
def _places(R, I, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    """Rows and columns of the program, and which are inside."""
    blocks = tl.cdiv(I, BLOCK_I)
    r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    return r, c, (r < R) & (c < I)


@triton.jit
def _both(gate, up, r, c, on, I, stride_gate, stride_up):
    gate += r * stride_gate + c
    up = gate + I if up is None else up + r * stride_up + c
    return tl.load(gate, mask=on, other=0.0).to(tl.float32), tl.load(up, mask=on, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(z):
    """Without overflow; and its derivative."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e), e / ((1.0 + e) * (1.0 + e))


@triton.jit(do_not_specialize=["R"])
def _gated(gate, up, out, R, I, stride_gate, stride_up, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    r, c, on = _places(R, I, BLOCK_R, BLOCK_I)
    x, y = _both(gate, up, r, c, on, I, stride_gate, stride_up)
    z = (x + x * x * x * CUBIC) * LINEAR if GELU else x
    tl.store(out + r * I + c, (x * _sigmoid(z)[0] * y).to(out.dtype.element_ty), mask=on)


@triton.jit(do_not_specialize=["R"])
def _gated_backward(
    gate, up, grad, dgate, dup, R, I, stride_gate, stride_up, stride_grad,
    GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    r, c, on = _places(R, I, BLOCK_R, BLOCK_I)
    x, y = _both(gate, up, r, c, on, I, stride_gate, stride_up)
    g = tl.load(grad + r * stride_grad + c, mask=on, other=0.0).to(tl.float32)
    if GELU:
        sigmoid, slope = _sigmoid((x + x * x * x * CUBIC) * LINEAR)
        slope *= (1.0 + x * x * (3 * CUBIC)) * LINEAR
    else:
        sigmoid, slope = _sigmoid(x)
    dx, dy = g * y * (sigmoid + x * slope), g * x * sigmoid
    dgate += r * (2 * I if dup is None else I) + c
    tl.store(dgate, dx.to(dgate.dtype.element_ty), mask=on)
    dup = dgate + I if dup is None else dup + r * I + c
    tl.store(dup, dy.to(dup.dtype.element_ty), mask=on)
