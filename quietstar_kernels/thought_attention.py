"""thought_attention: attention over packed text and thought rows, forward and backward."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from ._options import AttentionOptions
from .branches import Branches
from .checks import FLOATS, Checker, check_attention, check_instance, under_autocast
from .layout import ThoughtLayout

_OP = "thought_attention"


@overload
def thought_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: ThoughtLayout, scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., query_rows: str = ...,
    return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def thought_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: ThoughtLayout, scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., query_rows: str = ...,
    *, return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def thought_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: ThoughtLayout, scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., query_rows: str = ...,
    return_lse: bool = ..., backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThoughtLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_rows: str = "all",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each thought row sees the text up to its anchor and its own thought up to itself; text rows are causal.

    A layout with ``own="full"`` lets a thought row see all live rows of its own thought. In a ``tree`` it sees its parents'.

    Differentiable in q, k, v and sinks. Deterministic: two runs on one machine agree bitwise. Inputs may have any strides, as
    long as the last one is 1. Scores and sums are fp32 (fp64 for fp64 inputs). The mask is that of Quiet-STaR, section 4.2.

    NaN in a key or value, or infinity in a value, makes the rows that see it NaN; NaN in a query makes its own row NaN.
    Infinity in a key or query may do so too. No other row changes.

    Gradients are those of reverse mode: ``backward``, ``torch.func.grad``, ``vjp`` and ``jacrev``. Forward mode and second
    derivatives raise NotImplementedError. ``vmap`` runs one call after another.

    Args:
        q: [B,H,M,K], or [B,H,R,K] with ``query_rows="thoughts"``; fp32, fp16, bf16 or fp64.
        k: [B,G,M,K], H a multiple of G: query head h reads key head h // (H/G).
        v: [B,G,M,E]; K and E from 1 to 256. Under autocast q, k and v of several dtypes are cast to its dtype; equal ones stay.
        layout: which rows see which.
        scale: factor on q·k; default K**-0.5.
        window: W; a row at position id q sees only position ids above q - W.
        softcap: c; scores become c * tanh(score / c).
        sinks: [H], for each head a logit that is added to the softmax and has no value.
        query_rows: "all", or "thoughts" for only the R thought rows.
        return_lse: also return the natural log of the softmax denominator of each row.
        backend: "auto", or the name of one, which runs or raises.

    Returns:
        out [B,H,rows,E] in q's dtype; a row that is off is 0. With ``return_lse`` also lse [B,H,rows], fp32 (fp64 for fp64
        inputs), sinks included, -inf where a row is off. Both are differentiable.

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check_instance(_OP, "layout", layout, ThoughtLayout)
    R = layout.R
    check = Checker(_OP, B=layout.B, M=layout.L + R, R=R)
    check.choice("query_rows", query_rows, ("all", "thoughts"))
    device = layout.device
    q, k, v = under_autocast(q, k, v)
    check.tensor("q", q, "B,H,M,K" if query_rows == "all" else "B,H,R,K", FLOATS, device, "layout")
    check.tensor("k", k, "B,G,M,K", (q.dtype,), device, "q")
    check.tensor("v", v, "B,G,M,E", (q.dtype,), device, "q")
    check_attention(check, "k", "v", sinks, device)
    check.last_strides_one(q=q, k=k, v=v)
    check.flag("return_lse", return_lse)
    window = check.window(window)
    scale = q.shape[-1] ** -0.5 if scale is None else check.in_fp32("scale", check.positive("scale", scale))
    softcap = check.in_fp32("softcap", check.positive_or_none("softcap", softcap))
    branches = layout.branches
    backend = _dispatch.choose(_OP, backend, device, q.dtype, K=check["K"], E=check["E"])
    tensors = q, k, v, *branches[:3], branches.tree, branches.path, sinks
    out, lse = call(_forward, *tensors, branches.full, scale, window, softcap, backend)
    return (out, lse) if return_lse else out


def _thought_attention(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, table: Tensor, of_row: Tensor, tree: Tensor | None, path: Tensor | None,
    sinks: Tensor | None, full: bool, scale: float, window: int | None, softcap: float | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    branches, options = Branches(lo, table, of_row, full, tree, path), AttentionOptions(scale, window, softcap, sinks)
    out, lse = _dispatch.run(_OP, backend, q, k, v, branches, options)
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=wide)


def _thought_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lo: Tensor, table: Tensor, of_row: Tensor, tree: Tensor | None, path: Tensor | None, sinks: Tensor | None,
    full: bool, scale: float, window: int | None, softcap: float | None, backend: str, grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0:
        return _as_tensors(*(None if y is None else y.new_zeros(y.shape) for y in (q, k, v, sinks)))
    branches, options = Branches(lo, table, of_row, full, tree, path), AttentionOptions(scale, window, softcap, sinks)
    return _as_tensors(*_dispatch.run(f"{_OP}_backward", backend, grad_out, q, k, v, out, lse, branches, options, grad_lse))


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = rest[7]
    return _as_tensors(*(None if y is None else y.new_empty(y.shape) for y in (q, k, v, sinks)))


def _as_tensors(dq: Any, dk: Any, dv: Any, dsinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, with an empty tensor where there are no sinks: an operator returns tensors only."""
    return dq, dk, dv, dq.new_empty(0) if dsinks is None else dsinks


def _flops_backward(grad_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, **_: Any) -> int:
    """Scores again, and the gradients of q, k, v and the weights."""
    return _flops(q, k, v, *rest, products=(3, 2))


def _flops(q: Any, k: Any, v: Any, lo: Any, table: Any, of_row: Any, *_: Any, products: Any = (1, 1), **__: Any) -> int:
    """As PyTorch counts causal attention: all keys of the text for each row, and those of a branch of mean length.

    ``products``: how many have the width of keys, and how many that of values.
    """
    (B, H, rows, K), (L, R, C) = q, (lo[1], of_row[1], table[1])
    thoughts = min(rows, R)
    pairs = rows * L + thoughts * R // max(C, 1)
    return 2 * B * H * pairs * (products[0] * K + products[1] * v[3])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.rest = inputs[:9], inputs[9:]
    ctx.set_materialize_grads(False)  # no zeros for the lse
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
    q, k, v, *layout, sinks, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    if grad_out is None:
        grad_out = out.new_zeros(out.shape)
    dq, dk, dv, dsinks = call(_backward, grad_out, q, k, v, out, lse, *layout, sinks, *ctx.rest, grad_lse)
    return dq, dk, dv, *[None] * len(layout), None if sinks is None else dsinks, *[None] * len(ctx.rest)


_INSTEAD = "quietstar_kernels.testing.plain_attention has all, in dense PyTorch"
_backward = operator(_thought_attention_backward, _fake_backward, instead=_INSTEAD, flops=_flops_backward)
_forward = operator(_thought_attention, _fake, _setup_context, _autograd, instead=_INSTEAD, flops=_flops)
