"""The own part of ``thought_attention``: the rows of each thought over its own rows, a query head and some thoughts at a time.

Small matmuls on views of the caller's tensors: at these sizes, copies would take as long as the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.cpu.plain._parts import scores_of
from quietstar_kernels.reference import wide

SCORES = 2**18  # at a time: 1 MB of fp32, which fits a core's cache


def own_mask(S: int, window: int | None, like: Tensor) -> Tensor:
    """[S,S], 0 where row s sees own row s', else -inf."""
    hidden = like.new_full((S, S), -math.inf)
    return hidden.triu(1) if window is None else hidden.triu(1) + hidden.tril(-window)


def own_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, options: AttentionOptions) -> None:
    """Writes out [B,H,R,E] and lse [B,H,R] of thought rows q [B,H,R,K] over their own k [B,G,R,K], v [B,G,R,E]."""
    for b, h, g, rows in _pieces(q, k, len(mask)):
        q3, k3, v3, o3 = (_thoughts(x, len(mask)) for x in (q[b, h, rows], k[b, g, rows], v[b, g, rows], out[b, h, rows]))
        scores = scores_of(wide(q3), wide(k3), options).add_(mask)
        top = scores.amax(-1, keepdim=True)  # finite: a row sees itself
        p = scores.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        torch.bmm(p.div_(total), wide(v3), out=o3)
        _thoughts(lse[b, h, rows], len(mask)).copy_((top + total.log_())[..., 0])


def own_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    mask: Tensor,
    options: AttentionOptions,
) -> None:
    """Writes dq, and dk, dv of the own rows, from the joint ``lse`` and ``delta`` = rowsum(grad_out * joint out)."""
    S, group = len(mask), q.shape[1] // k.shape[1]
    for b, h, g, rows in _pieces(q, k, S):
        g3, q3 = wide(_thoughts(grad_out[b, h, rows], S)), wide(_thoughts(q[b, h, rows], S))
        k3, v3 = wide(_thoughts(k[b, g, rows], S)), wide(_thoughts(v[b, g, rows], S))
        scores = scores_of(q3, k3, options)
        slope = None if options.softcap is None else 1 - (scores / options.softcap) ** 2
        p = scores.add_(mask).sub_(_thoughts(lse[b, h, rows], S)[..., None]).exp_()
        ds = torch.bmm(g3, v3.transpose(1, 2)).sub_(_thoughts(delta[b, h, rows], S)[..., None]).mul_(p).mul_(options.scale)
        if slope is not None:
            ds *= slope
        torch.bmm(ds, k3, out=_thoughts(dq[b, h, rows], S))
        for grad, left, right in ((dk[b, g, rows], ds, q3), (dv[b, g, rows], p, g3)):
            grad = _thoughts(grad, S)
            if h % group == 0:
                torch.bmm(left.transpose(1, 2), right, out=grad)
            else:
                grad.baddbmm_(left.transpose(1, 2), right)


def _pieces(q: Tensor, k: Tensor, S: int) -> Iterator[tuple[int, int, int, slice]]:
    """Batch row, query head, its key head, and rows of whole thoughts."""
    B, H, R = q.shape[:3]
    step = max(1, SCORES // (S * S)) * S
    for b in range(B):
        for h in range(H):
            for start in range(0, R, step):
                yield b, h, h * k.shape[1] // H, slice(start, min(start + step, R))


def _thoughts(x: Tensor, S: int) -> Tensor:
    """[c*S,...] as [c,S,...], a view."""
    return x.unflatten(0, (-1, S))
