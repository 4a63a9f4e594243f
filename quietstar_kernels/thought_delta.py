"""thought_delta: recurrent layers with a state (gated delta rule, KDA, Mamba-2) over packed text and thought rows.

A row takes the state S [K,E] of the row before it on its path, lets it decay, writes to it, and reads it:

    S <- diag(exp(g)) S,   w = beta (v - k S),   S <- S + k w^T,   out = q S

(Gated Delta Networks, arXiv 2412.06464, equation 10; a decay for each channel: Kimi Linear, arXiv 2510.26692.) Without beta,
w = v, which is Mamba-2 (arXiv 2405.21060) with v = dt x. The first row of a thought follows its anchor's text row, so the
state splits there without a copy of the text. What a row leaves for the rows after it is (k, w, g), like a key and a value.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, Checker, check_instance, check_steps, refuse_where
from .delta import fla, matmul, reference
from .delta.matmul import finite, known
from .layout import ThoughtLayout

_OP = "thought_delta"
BACKENDS: dict[str, ModuleType] = {"matmul": matmul, "fla": fla, "reference": reference}


class DeltaRows(NamedTuple):
    """What rows leave for the rows after them.

    Attributes:
        k: [B,G,rows,K], keys.
        w: [B,H,rows,E], what each row wrote, fp32 (fp64 for fp64 inputs).
        g: [B,H,rows], or [B,H,rows,K] with a decay for each channel; the logarithm of the decay.
    """

    k: Tensor
    w: Tensor
    g: Tensor


def thought_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    layout: ThoughtLayout,
    text: DeltaRows | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrence over text and thoughts, each thought from the state at its anchor; in a tree from its parent's last row.

    Differentiable in all tensors. Computes in fp32 (fp64 for fp64 v), whatever autocast says. NaN in a row's k, v, g or beta
    makes that row and those after it on its paths NaN; NaN in q its own row. No other row changes, and none has a gradient
    from those.

    Args:
        q: [B,G,M,K], scaled, and normalised where the model does that; [B,G,R,K] with ``text``, and so on.
        k: [B,G,M,K], H a multiple of G: head h reads key head h // (H/G).
        v: [B,H,M,E].
        g: [B,H,M], or [B,H,M,K] with a decay for each channel; finite, at most 0.
        beta: [B,H,M], how much of the old value under a key is replaced; None writes v.
        layout: which row follows which; ``own="full"`` is refused, and so is an ``lo`` that is not the start of a document.
        text: what the text's rows left, from an earlier call. The other arguments then hold the R thought rows alone.
        backend: "auto", "matmul", "reference", or "fla", which "auto" takes only if QUIETSTAR_FLA=1 is set.

    Returns:
        out [B,H,rows,E] in v's dtype, and w [B,H,rows,E] for ``DeltaRows``; both 0 where a row is off.

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check = check_arguments(_OP, q, k, v, g, beta, layout, "R" if text is not None else "M")
    if text is not None:
        check_rows(check, "text", text, "L", layout.device)
    check.choice("backend", backend, ("auto", *BACKENDS))
    first = layout.M - v.shape[2]
    live = layout.table("recurrent rows", _recurrent_rows)
    live = None if live is None else live[:, None, first:, None]
    dtype, wide_dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        rows = [x.to(wide_dtype) for x in (q, k, v, columns(g, v))] + ([] if beta is None else [beta.to(wide_dtype)[..., None]])
        rows = [_where_on(x, live) for x in rows]
        bad, bad_q = not_finite(*rows[1:], heads=v.shape[1]), not_finite(rows[0], heads=v.shape[1])
        poisoned = None
        if not known(bad) or bool((bad | bad_q).any()) or text is not None:
            rows = [finite(x) for x in rows]
            poisoned = _poisoned(bad, layout, text)
        q, k, v, g = rows[:4]
        past = None if text is None else DeltaRows(*map(finite, widened(text, wide_dtype)))
        by_fla = fla.serves(backend, v.device, dtype, k.shape[-1], beta is not None, past is not None)
        module = fla if by_fla else BACKENDS["matmul" if backend == "auto" else backend]
        out, w = module.thought_delta(q, k, v, g, None if beta is None else rows[4], layout, past)
        if poisoned is not None:
            out = out.masked_fill((poisoned | bad_q)[..., None], torch.nan)
            w = w.masked_fill(poisoned[..., None], torch.nan)
        out, w = _where_on(out, live), _where_on(w, live)
    return out.to(dtype), w


def _recurrent_rows(layout: ThoughtLayout) -> Tensor | None:
    """bool [B,M], the rows that are on; None if all are, as a host can tell. Raises ValueError for what no recurrence can
    follow."""
    check_recurrent(_OP, layout)
    live = layout.branches.rows_on()
    return None if known(live) and bool(live.all()) else live


def _where_on(x: Tensor, live: Tensor | None) -> Tensor:
    return x if live is None else x.where(live, 0)


def check_recurrent(op: str, layout: ThoughtLayout) -> None:
    """Raises ValueError for a layout in which a row doesn't follow one other row, with all that this one sees."""
    check_steps(Checker(op), layout.own)
    lo, t = layout.lo, torch.arange(layout.L, device=layout.device)
    cut = (lo[:, 1:] != lo[:, :-1]) & (lo[:, 1:] != t[1:])
    refuse_where(cut, f"{op}: lo must be the start of a document, whose state begins at zero")


def columns(g: Tensor, v: Tensor) -> Tensor:
    """[B,H,rows,1], or [B,H,rows,K] as it is."""
    return g[..., None] if g.ndim < v.ndim else g


def widened(rows: DeltaRows, dtype: torch.dtype) -> DeltaRows:
    """In a dtype, and g with a last dimension of 1 or K."""
    return DeltaRows(rows.k.to(dtype), rows.w.to(dtype), columns(rows.g, rows.w).to(dtype))


def not_finite(*tensors: Tensor, heads: int) -> Tensor:
    """bool [B,H,rows]: where one of [B,heads or fewer,rows,*] holds NaN or infinity."""
    sums = [x.sum(-1) for x in tensors]  # one pass; a sum that overflows counts too
    bad = [~x.isfinite().repeat_interleave(heads // x.shape[1], 1) for x in sums]
    return torch.stack(bad).any(0)


def _poisoned(bad: Tensor, layout: ThoughtLayout, text: DeltaRows | None) -> Tensor:
    """bool [B,H,rows]: rows with a bad one on their path, themselves included."""
    first = layout.M - bad.shape[2]
    if text is not None:
        bad = torch.cat([~text.w.sum(-1).isfinite(), bad], 2)  # NaN where a row was poisoned
    above = layout.branches.parent_rows()
    above = torch.where(above < 0, torch.arange(layout.M, device=bad.device), above)
    for _ in range(layout.M.bit_length()):  # from each row to the one 1, 2, 4, .. above it
        bad = bad | bad.gather(2, above[:, None].expand_as(bad))
        above = above.gather(1, above)
    return bad[:, :, first:]


def check_arguments(
    op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, layout: ThoughtLayout, rows: str
) -> Checker:
    check_instance(op, "layout", layout, ThoughtLayout)
    check = Checker(op, B=layout.B, M=layout.M, R=layout.R, L=layout.L, **{"P*N": layout.P * layout.N})
    device = layout.device
    check.tensor("v", v, f"B,H,{rows},E", FLOATS, device, "layout")
    check.tensor("q", q, f"B,G,{rows},K", FLOATS, device, "v")
    check.tensor("k", k, f"B,G,{rows},K", FLOATS, device, "v")
    check.tensor("g", g, f"B,H,{rows},K" if getattr(g, "ndim", 0) == 4 else f"B,H,{rows}", FLOATS, device, "v")
    if beta is not None:
        check.tensor("beta", beta, f"B,H,{rows}", FLOATS, device, "v")
    if check["G"] == 0 or check["H"] % check["G"]:
        raise check.fail(f"H must be a multiple of G, got H={check['H']} in v, G={check['G']} in k")
    return check


def check_rows(check: Checker, name: str, rows: DeltaRows, letters: str, device: torch.device) -> None:
    check.tensor(f"{name}.k", rows.k, f"B,G,{letters},K", FLOATS, device, "layout")
    check.tensor(f"{name}.w", rows.w, f"B,H,{letters},E", FLOATS, device, "layout")
    wanted = f"B,H,{letters}" + (",K" if rows.g.ndim > rows.w.ndim - 1 else "")
    check.tensor(f"{name}.g", rows.g, wanted, FLOATS, device, "layout")
