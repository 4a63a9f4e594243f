"""thought_attention on GPUs: what calls the kernels of the forward and, in two files, the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._options import AttentionOptions
from ...branches import Branches
from .. import gluon_is_on
from .._launch import compiling_at_once, near, plan
from ..configs import INTERPRETED
from .backward import Inputs, query_gradient, row_tables
from .backward_keys import key_gradients
from .forward import gluon_serves
from .forward import thought_attention as launch_forward

_compiled: set[tuple] = set()


def thought_attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Implements ``reference.thought_attention``. If a backward will launch kernels, they are compiled at the same time."""
    if q.requires_grad and q.numel() and not INTERPRETED:
        _, window, softcap, sinks = options
        given = [x is None for x in (window, softcap, sinks, branches.tree)]
        kind = q.device, q.dtype, q.shape[-1], v.shape[-1], *given
        if kind not in _compiled:
            _compiled.add(kind)
            compile_at_once(q, k, v, branches, options)
    return launch_forward(near(q), near(k), near(v), branches, options)


def thought_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, branches: Branches,
    options: AttentionOptions, grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Implements ``reference.thought_attention_backward``."""
    scale, window, softcap, sinks = options
    grad_out, q, k, v, out = (near(x) for x in (grad_out, q, k, v, out))
    if sinks is not None:
        sinks = sinks.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    layout = branches.contiguous()
    given = grad_out, q, k, v, out, lse, grad_lse, sinks, *layout
    on = gluon_is_on()
    known = plan("thought_attention_backward", given, branches.full, scale, window, softcap, on)
    in_gluon = on and gluon_serves(known, q, k, v, grad_out)
    tables = row_tables(grad_out, out, lse, grad_lse, branches, layout, window, sinks, known)
    inputs = Inputs(grad_out, q, k, v, branches, layout, options, tables, known, in_gluon)
    dq = query_gradient(inputs)
    dk, dv = key_gradients(inputs)
    dsinks = None if sinks is None or tables.dsinks is None else tables.dsinks.sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks


def compile_at_once(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> None:
    """Compile the forward and the backward for such arguments, and for a gradient of ``out`` with the strides of ``out``."""
    q, k, v = (_without_data(x) for x in (q, k, v))
    branches = Branches(*(x.to("meta") if isinstance(x, Tensor) else x for x in branches))  # type: ignore[arg-type]
    if options.sinks is not None:
        options = options._replace(sinks=_without_data(options.sinks))
    with compiling_at_once():
        out, lse = launch_forward(q, k, v, branches, options)
        thought_attention_backward(out, q, k, v, out, lse, branches, options)


def _without_data(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
