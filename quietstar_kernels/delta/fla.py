"""thought_delta through FLA's public functions (fla-core: ``chunk_gated_delta_rule``, ``chunk_kda``), which take sequences.

A row with k = 0, beta = 0 and g = 0 leaves the state alone and returns q S: a *read*. So one call over the documents of the
text, with reads by the K unit vectors behind the rows of anchors, gives the states there. The branches are sequences from
these; those of a tree go on from the final states of their parents, level by level. w comes from reads too, one before each
row.

It computes in bf16 with the state in fp32, as FLA does. On a GPU it has not run yet, so it must be asked for, by
``backend="fla"`` or QUIETSTAR_FLA=1. The host makes the plan, once per layout.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import ThoughtLayout
from . import matmul

Rule = Callable[..., tuple[Tensor, Any]]


def why_not(
    device: torch.device, dtype: torch.dtype | None = None, K: int = 0, beta: bool = True, text: bool = False
) -> str | None:
    """None if FLA serves such calls, else the reason, in words."""
    if importlib.util.find_spec("fla") is None:
        return "FLA is not installed (pip install fla-core)"
    if device.type != "cuda":
        return f"it serves GPUs, these tensors are on {device}"
    if dtype not in (None, torch.bfloat16):
        return f"it computes in torch.bfloat16, not in {dtype}"
    if not beta:
        return "it has no rule without beta"
    if text:
        return "it needs the text's rows, not what they left"
    return None if K <= 256 else f"it takes K up to 256, got {K}"


why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it instead of tracing it


def serves(backend: str, *call: Any) -> bool:
    """Whether this is asked for ``call``, as ``why_not`` takes it, and can serve. Raises ValueError if only it is asked."""
    if backend != "fla" and (backend != "auto" or os.environ.get("QUIETSTAR_FLA") != "1"):
        return False
    reason = why_not(*call)
    if reason is not None and backend == "fla":
        raise ValueError(f"thought_delta: backend 'fla' is not available: {reason}")
    return reason is None


def thought_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, layout: ThoughtLayout, text: tuple | None = None,
    rule: Rule | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference's function, for a beta and no ``text``.

    Args:
        rule: f(q, k, v, g, beta, initial_state, output_final_state, cu_seqlens) for sequences one after another, q and k
            [1,T,G,K], v [1,T,H,E], g [1,T,H] or [1,T,H,K], beta [1,T,H]; returns out and final states, as FLA's functions do.
    """
    assert beta is not None and text is None
    (B, H, M, E), K, scan = v.shape, k.shape[-1], partial(_scan, rule or _fla)
    plan = layout.table(f"fla {K}", partial(_plan, K=K))
    if not len(plan.text.rows):
        return torch.zeros_like(v), torch.zeros_like(v)
    if g.shape[-1] > 1:  # the decay is part of the keys
        q, k = (x.repeat_interleave(H // x.shape[1], 1) for x in (q, k))
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, g, beta)]  # [B*M,heads,*]
    units = torch.eye(K, dtype=q.dtype, device=q.device).repeat(plan.anchors, 1)[:, None].expand(-1, q.shape[1], -1)
    out, w, read, _ = scan(rows, units, plan.text)
    outs, writes, states = [out], [w], read.unflatten(0, (plan.anchors, K)).transpose(1, 2)
    for level in plan.levels:  # a state's gradients are summed in a fixed order
        out, w, _, last = scan(rows, units[:0], level, states[level.above], level is not plan.levels[-1])
        states = states if last is None else last
        outs.append(out)
        writes.append(w)
    where, flat = torch.cat([x.rows for x in (plan.text, *plan.levels)]), v.new_zeros(B * M, H, E)
    out, w = (flat.index_copy(0, where, torch.cat(x)).view(B, M, H, E).transpose(1, 2) for x in (outs, writes))
    return out, w


def _scan(
    rule: Rule, rows: list[Tensor], reads: Tensor, sequences: Sequences, state: Tensor | None = None, final: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """out and w of the sequences' rows, what ``reads`` [m,G,K] read, and the final states."""
    q, k, v, g, beta = (x.index_select(0, sequences.rows) for x in rows)
    (n, m), decay, by_channel = (len(v), len(reads)), g.exp(), g.shape[-1] > 1
    q = torch.cat([q, k * decay if by_channel else k, reads])
    steps = [q, *(pad(x, (0, 0, 0, 0, 0, n + m)) for x in (k, v, g, beta))]
    q, k, write, g, ratio = (x.index_select(0, sequences.order)[None] for x in steps)
    o, last = rule(q, k, write, g if by_channel else g[..., 0], ratio[..., 0], state, final, sequences.ends)
    out, before, read = torch.zeros_like(o[0]).index_copy(0, sequences.order, o[0]).split([n, n, m])
    return out, beta * (v - (before if by_channel else before * decay)), read, last


def _fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, final: bool, ends: Tensor
) -> tuple[Tensor, Tensor | None]:
    name, module = ("chunk_kda", "kda") if g.ndim == q.ndim else ("chunk_gated_delta_rule", "gated_delta_rule")
    rule = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    q, k, v, beta = (x.to(torch.bfloat16) for x in (q, k, v, beta))
    o, last = rule(q, k, v, g, beta, scale=1.0, initial_state=state, output_final_state=final, cu_seqlens=ends)
    return o.float(), last


class Sequences(NamedTuple):
    """Sequences of rows and reads: n rows, then n reads of what is before each, then m others, put in order.

    Attributes:
        rows: int64 [n], among those of [B*M].
        order: int64 [2n+m].
        ends: int64, where sequences begin and end, from 0 to 2n+m.
        above: int64, which state each begins with, among those of the anchors or of the level before; none for the text.
    """

    rows: Tensor
    order: Tensor
    ends: Tensor
    above: Tensor


class Plan(NamedTuple):
    """The documents of the text, with reads behind anchors; how many anchors differ; the branches, level by level."""

    text: Sequences
    anchors: int
    levels: list[Sequences]


def _plan(layout: ThoughtLayout, K: int) -> Plan:
    L, M = layout.L, layout.M
    t, none = torch.arange(layout.B * L), torch.arange(0)
    plan = matmul.plan_of(layout, max(layout.rows, 1))  # a chunk for each branch
    behind = (plan.batch * L + plan.anchor).cpu().repeat_interleave(K)
    document = (layout.lo.cpu() == torch.arange(L)).flatten().cumsum(0) - 1
    text = _sequences(t + t // max(L, 1) * (M - L), behind, document, none, layout.device)
    levels, batches, tables = [], plan.rows.batch.cpu().split(plan.sizes), plan.rows.row[:, 0].cpu().split(plan.sizes)
    for batch, row, above in zip(batches, tables, [plan.first, *plan.above], strict=False):
        sequence = (row >= 0).nonzero()[:, 0]
        levels.append(_sequences((batch * M + L + row)[row >= 0], none, sequence, above, layout.device))
    return Plan(text, len(plan.anchor), levels)


def _sequences(rows: Tensor, behind: Tensor, sequence: Tensor, above: Tensor, device: torch.device) -> Sequences:
    """Of rows, reads behind some of them, numbered from 0 to n-1, and the number of each row's sequence, ascending."""
    n = torch.arange(len(rows))
    order = torch.cat([3 * n + 1, 3 * n, 3 * behind + 2]).argsort(stable=True)
    ends = pad(torch.cat([sequence.repeat(2), sequence[behind]]).bincount().cumsum(0), (1, 0))
    return Sequences(*(x.to(device) for x in (rows, order, ends, above)))
