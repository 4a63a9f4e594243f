"""gated_activation on CPUs, csrc/cpu/layer.hpp."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from . import _library
from .rms_norm import as_rows


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Implements ``reference.gated_activation``."""
    if not _library.computes(gate.dtype):
        return reference.gated_activation(gate, up, activation)
    out = gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1)))
    _library.ops().gated_activation(as_rows(gate), as_rows(up), None, out, None, activation == "gelu_tanh")
    return out


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """Implements ``reference.gated_activation_backward``."""
    if not _library.computes(gate.dtype):
        return reference.gated_activation_backward(grad, gate, up, activation)
    dgate, dup = gate.new_empty(gate.shape), None if up is None else gate.new_empty(gate.shape)
    _library.ops().gated_activation(*map(as_rows, (gate, up, grad)), dgate, dup, activation == "gelu_tanh")
    return dgate, dup
