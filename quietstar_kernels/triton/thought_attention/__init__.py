"""thought_attention on GPUs: the forward in one file, the backward in several."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.branches import Branches
from quietstar_kernels.triton._launch import compiling_at_once
from quietstar_kernels.triton._target import INTERPRETED
from quietstar_kernels.triton.thought_attention.backward import thought_attention_backward
from quietstar_kernels.triton.thought_attention.forward import thought_attention as launch_forward

__all__ = ["thought_attention", "thought_attention_backward"]
_compiled: set[tuple] = set()


def thought_attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """As ``reference.thought_attention``. If a backward will follow, its kernels are compiled along with the forward's."""
    if q.requires_grad and not INTERPRETED:
        _, window, softcap, sinks = options
        kind = q.device, q.dtype, q.shape[-1], v.shape[-1], window is None, softcap is None, sinks is None
        if kind not in _compiled:
            _compiled.add(kind)
            compile_at_once(q, k, v, branches, options)
    return launch_forward(q, k, v, branches, options)


def compile_at_once(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> None:
    """Compile the forward and the backward for such arguments, and for a gradient of ``out`` with the strides of ``out``."""
    q, k, v = (_without_data(x) for x in (q, k, v))
    branches = branches.to("meta")
    if options.sinks is not None:
        options = options._replace(sinks=_without_data(options.sinks))
    with compiling_at_once():
        out, lse = launch_forward(q, k, v, branches, options)
        thought_attention_backward(out, q, k, v, out, lse, branches, options)


def _without_data(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
