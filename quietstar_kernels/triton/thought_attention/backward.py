"""Backward of thought_attention, without atomics: each gradient is summed by one program, in a fixed order.

First tables of the query rows (``backward_rows``), then dq (``backward_queries``), then dk and dv (``backward_keys``). The last
two both compute the scores again, which makes seven matrix products. A single pass for all three takes five, but has to add up
dq across programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.branches import Branches
from quietstar_kernels.triton._launch import plan
from quietstar_kernels.triton.thought_attention.backward_keys import key_gradients
from quietstar_kernels.triton.thought_attention.backward_queries import query_gradient
from quietstar_kernels.triton.thought_attention.backward_rows import Inputs, row_tables


def thought_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    branches: Branches,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``reference.thought_attention_backward``."""
    scale, window, softcap, sinks = options
    if q.numel() == 0:
        none = None if sinks is None else torch.zeros_like(sinks)
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), none
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    given = grad_out, q, k, v, out, sinks, *branches[:3]
    known = plan("thought_attention_backward", given, branches.full, scale, window, softcap)
    tables = row_tables(grad_out, out, lse, branches, window, sinks, known)
    inputs = Inputs(grad_out, q, k, v, branches, options, tables, known)
    dq = query_gradient(inputs)
    dk, dv = key_gradients(inputs)
    dsinks = None if sinks is None or tables.dsinks is None else tables.dsinks.sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks
