"""thought_attention on CPUs, csrc/cpu/forward.hpp and backward.hpp: this allocates what they write."""

from __future__ import annotations

import torch
from torch import Tensor

from .._options import AttentionOptions
from ..branches import END, LENGTH, PARENT, START, Branches
from . import _library
from .plain import thought_attention as plain

WIDTH = 16  # of rows of partial sums: a multiple of this, as in csrc/cpu/backward.hpp
PARTS = 16  # of all heads together at least, for threads to share; a number that depended on them would change the last bits
TILE = 112  # query rows for which a part of its own is worth it


def thought_attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Implements ``reference.thought_attention``."""
    if not _library.serves(q.dtype):
        return plain.thought_attention(q, k, v, branches, options)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _library.ops().thought_attention(
        *map(with_rows, (q, k, v)), *branches[:3], branches.tree, sinks(options), out, lse, branches.full, *numbers(options)
    )
    return out, lse


def thought_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, branches: Branches,
    options: AttentionOptions, grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Implements ``reference.thought_attention_backward``."""
    if not _library.serves(q.dtype):
        return plain.thought_attention_backward(grad_out, q, k, v, out, lse, branches, options, grad_lse)
    B, H, rows, K = q.shape
    G, E = k.shape[1], v.shape[-1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    parts = min(-(-PARTS // max(B * G, 1)), -(-rows * H // (G * TILE)) or 1)
    # Sums that are as wide as the gradients are made where these are returned; for the text, if one part makes them alone.
    returned = q.dtype == torch.float32 and K % WIDTH == 0 and E % WIDTH == 0
    in_place = returned and parts == 1
    own_sums = 0 if returned or not branches.table.numel() else int(_rows_together(branches).amax())
    width = sum(-(-x // WIDTH) * WIDTH for x in (K, E))
    sums = q.new_empty((B, G, parts, own_sums + (0 if in_place else branches.L), width), dtype=torch.float32)
    dsinks = None if options.sinks is None else q.new_empty((B, G, parts, H // G), dtype=torch.float64)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    _library.ops().thought_attention_backward(
        *map(with_rows, (grad_out, q, k, v, out)), lse.contiguous(), *branches[:3], branches.tree, sinks(options), dq, dk,
        dv, sums, dsinks, grad_lse, branches.full, parts, own_sums, *numbers(options),
    )  # fmt: skip
    if dsinks is None or options.sinks is None:
        return dq, dk, dv, None
    return dq, dk, dv, dsinks.sum((0, 2)).flatten().to(options.sinks.dtype)


def _rows_together(branches: Branches) -> Tensor:
    """[B,C]: rows of each branch, or of each tree that begins with a node."""
    if branches.tree is None:
        return branches.table[..., LENGTH]
    return (branches.tree[..., END] - branches.table[..., START]).masked_fill(branches.tree[..., PARENT] >= 0, 0)


def with_rows(x: Tensor) -> Tensor:
    """``x``, or a copy if the numbers of a row don't lie side by side, as in the gradient of a sum."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def sinks(options: AttentionOptions) -> Tensor | None:
    return None if options.sinks is None else options.sinks.float().contiguous()


def numbers(options: AttentionOptions) -> tuple[float, int, float]:
    """Scale, window and soft cap; 0 where there is none."""
    return options.scale, options.window or 0, options.softcap or 0.0
