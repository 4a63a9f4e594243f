"""rotary and rotary_decode on CPUs, csrc/cpu/layer.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import _library
from .thought_attention import with_rows


def rotary(
    qkv: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, offset: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Implements ``reference.rotary``."""
    if not _library.computes(qkv.dtype, cos, sin, q_weight, k_weight):
        return reference.rotary(qkv, k, cos, sin, H, G, q_weight, k_weight, eps, offset)
    q_out, k_out = _heads(qkv, H, cos), _heads(qkv, G, cos)
    v_out = _heads(qkv, G, cos) if k is None else None
    _library.ops().rotary(*_rows(qkv, k, None, cos, sin, q_weight, k_weight), q_out, k_out, v_out, 0, eps, offset)
    return q_out, k_out, v_out


def rotary_decode(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, k_own: Tensor, v_own: Tensor,
    step: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float,
) -> Tensor:  # fmt: skip
    """Implements ``reference.rotary_decode``."""
    if not _library.computes(qkv.dtype, cos, sin, q_weight, k_weight):
        return reference.rotary_decode(qkv, k, v, cos, sin, H, G, k_own, v_own, step, q_weight, k_weight, eps, offset)
    q = _heads(qkv, H, cos)
    _library.ops().rotary(*_rows(qkv, k, v, cos, sin, q_weight, k_weight), q, k_own, v_own, int(step), eps, offset)
    if not k_own.is_inference():
        torch.autograd.graph.increment_version((k_own, v_own))
    return q


def rotary_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, cos: Tensor, sin: Tensor, qkv: Tensor | None, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, needs_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Implements ``reference.rotary_backward``."""
    grads = grad_q, grad_k, grad_v
    if not _library.computes(grad_q.dtype, cos, sin, q_weight, k_weight):
        return reference.rotary_backward(*grads, cos, sin, qkv, k, q_weight, k_weight, eps, offset, needs_weights)
    (B, H, n, K), G = grad_q.shape, grad_k.shape[1]
    d = grad_q.new_empty(B, n, (H if grad_v is None else H + 2 * G) * K)
    dk = grad_q.new_empty(B, n, G * K) if grad_v is None else None
    weights = q_weight, k_weight
    dweights = [None if w is None or not needs_weights else w.new_empty(w.shape) for w in weights]
    _library.ops().rotary_backward(*_rows(*grads, cos, sin, qkv, k, *weights), d, dk, *dweights, eps, offset)
    return d, dk, dweights[0], dweights[1]


def _rows(*inputs: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else with_rows(x) for x in inputs]


def _heads(like: Tensor, heads: int, cos: Tensor) -> Tensor:
    return like.new_empty((*like.shape[:2], heads, cos.shape[-1])).transpose(1, 2)
