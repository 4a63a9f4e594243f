"""thought_decode: one new row of every thought over the text cache and the thought's own cache (no gradient)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from ._options import AttentionOptions
from .checks import (
    FLOATS,
    INTEGERS,
    Checker,
    check_attention,
    check_instance,
    check_steps,
    on_host,
    refuse_where,
    under_autocast,
)
from .layout import ThoughtLayout

_OP = "thought_decode"


def thought_decode(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    layout: ThoughtLayout,
    step: int | Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Row ``step`` of all P*N thoughts at once, as ``thought_attention`` would compute it; of all C branches if packed.

    It has no derivative: asking for one raises NotImplementedError.

    Args:
        q: [B,H,P*N,K], thought (p, n) at p*N + n; fp32, fp16, bf16 or fp64.
        k_text: [B,G,L,K], the text's keys.
        v_text: [B,G,L,E].
        k_own: [B,G,P*N,S,K], the thoughts' keys; rows 0..step must be written; later ones are not read. If the layout is
            packed, S is any number of rows. In a ``tree`` it holds all rows of each parent, and they must be written.
        v_own: [B,G,P*N,S,E].
        layout: which rows see which; ``own="full"`` is refused, since later rows are not there yet.
        step: 0 to S-1; an int, or a 0-d int32 or int64 tensor on the same device (one CUDA graph then serves all steps).
        scale, window, softcap, sinks, backend: as in ``thought_attention``.

    Returns:
        [B,H,P*N,E] in q's dtype; 0 for a thought whose row ``step`` is off.

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check_instance(_OP, "layout", layout, ThoughtLayout)
    device = layout.device
    check = Checker(_OP, B=layout.B, L=layout.L, **{"P*N": layout.P * layout.N})
    check_steps(check, layout.own)
    if layout.packed_rows is None:
        check.sizes["S"] = layout.S
    q, k_text, v_text, k_own, v_own = under_autocast(q, k_text, v_text, k_own, v_own)
    check.tensor("q", q, "B,H,P*N,K", FLOATS, device, "layout")
    same = (q.dtype,)
    check.tensor("k_text", k_text, "B,G,L,K", same, device, "q")
    check.tensor("v_text", v_text, "B,G,L,E", same, device, "q")
    check.tensor("k_own", k_own, "B,G,P*N,S,K", same, device, "q")
    check.tensor("v_own", v_own, "B,G,P*N,S,E", same, device, "q")
    check_attention(check, "k_text", "v_text", sinks, device)
    check.last_strides_one(q=q, k_text=k_text, v_text=v_text, k_own=k_own, v_own=v_own)
    S = check["S"]
    check_parents(check, "k_own", layout)
    if isinstance(step, Tensor):
        check.tensor("step", step, "", INTEGERS, device, "layout")
    else:
        step = torch.full((), check.integer("step", step, 0, S - 1, f"from 0 to S-1={S - 1}"), dtype=torch.int32, device=device)
    window = check.window(window)
    if window is not None and window >= layout.L + (S if layout.parent is None else layout.R):
        window = None  # it cuts nothing
    scale = q.shape[-1] ** -0.5 if scale is None else check.in_fp32("scale", check.positive("scale", scale))
    softcap = check.in_fp32("softcap", check.positive_or_none("softcap", softcap))
    return call(
        _forward,
        q,
        k_text,
        v_text,
        k_own,
        v_own,
        *layout.branches[:2],
        layout.branches.tree,
        step,
        sinks,
        scale,
        window,
        softcap,
        _dispatch.choose(_OP, backend, device, q.dtype, K=check["K"], E=check["E"]),
    )


def check_parents(check: Checker, own: str, layout: ThoughtLayout) -> None:
    """Raises ValueError if the S rows of ``own`` are fewer than those of a node with children."""
    if layout.parent is not None:
        above = layout.length[..., 0].gather(1, layout.parent.clamp(min=0).long())
        short = (layout.parent >= 0) & (above > check["S"])
        refuse_where(short, f"{check.op}: {own} must hold all rows of a node with children, got S={check['S']}")


def _thought_decode(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    lo: Tensor,
    table: Tensor,
    tree: Tensor | None,
    step: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> Tensor:
    if on_host(step):  # a tensor's value, which torch.compile doesn't know before
        most = k_own.shape[3] - 1
        Checker(_OP).integer("step", int(step), 0, most, f"from 0 to S-1={most}")
    options, trees = AttentionOptions(scale, window, softcap, sinks), [] if tree is None else [tree]
    return _dispatch.run("thought_decode", backend, q, k_text, v_text, k_own, v_own, lo, table, step, options, *trees)


def _fake(q: Tensor, k_text: Tensor, v_text: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v_text.shape[-1]))


def _flops(q: Any, k_text: Any, v_text: Any, k_own: Any, *_: Any, **__: Any) -> int:
    """All keys of the text and of the thought's own rows."""
    B, H, rows, K = q
    return 2 * B * H * rows * (k_text[2] + k_own[3]) * (K + v_text[3])


_forward = operator(_thought_decode, _fake, instead="thought_attention has one, in reverse mode", flops=_flops)
