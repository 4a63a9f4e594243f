"""thought_attention on GPUs: the forward and the backward, each in files of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._launch import compiling_at_once
from quietstar_kernels.triton._target import INTERPRETED
from quietstar_kernels.triton.thought_attention.backward import thought_attention_backward
from quietstar_kernels.triton.thought_attention.forward import thought_attention as launch_forward

__all__ = ["thought_attention", "thought_attention_backward"]
_compiled: set[tuple] = set()


def thought_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: ThoughtLayout,
    scale: float, window: int | None, softcap: float | None, sinks: Tensor | None, query_rows: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.thought_attention``. Where a backward will follow, its kernels are compiled with that of the forward."""
    if q.requires_grad and not INTERPRETED:
        kind = q.device, q.dtype, q.shape[-1], v.shape[-1], window is None, softcap is None, sinks is None
        if kind not in _compiled:
            _compiled.add(kind)
            compile_at_once(q, k, v, layout, scale, window, softcap, sinks, query_rows)
    return launch_forward(q, k, v, layout, scale, window, softcap, sinks, query_rows)


def compile_at_once(q: Tensor, k: Tensor, v: Tensor, layout: ThoughtLayout, *options: Any) -> None:
    """Compile the forward and the backward for such arguments, with a gradient of ``out`` that is laid out as ``out`` is."""
    q, k, v = (_without_data(x) for x in (q, k, v))
    rest: list[Any] = [_without_data(x) if isinstance(x, Tensor) else x for x in options]
    layout = layout.to("meta")
    with compiling_at_once():
        out, lse = launch_forward(q, k, v, layout, *rest)
        thought_attention_backward(out, q, k, v, out, lse, layout, *rest)


def _without_data(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
