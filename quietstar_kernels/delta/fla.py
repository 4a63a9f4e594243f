"""thought_delta through FLA's public functions (fla-core: ``chunk_gated_delta_rule``, ``chunk_kda``), which take sequences.

A row with k = 0, beta = 0 and g = 0 leaves the state alone and returns q S: a *read*. So one call over the documents of the
text, with reads behind the rows of anchors, gives all that branches need of it:

- *reads*: q S and k S for their rows. The branches are then sequences from a zero state, on v - k S.
- *states*: the state itself, read by the K unit vectors. The branches are then sequences from that; those of a tree go on from
  the final states of their parents, level by level.

What takes fewer reads is done. w comes from reads too, one before each row, so that all is as long as two rows for each.

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
from torch.nn.utils.rnn import pad_sequence

from ..branches import ANCHOR, LENGTH, PARENT, START
from ..layout import ThoughtLayout

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


def chosen(backend: str, *call: Any) -> str:
    """``backend``, or "fla" for "auto" if that is asked for and serves ``call``, as ``why_not`` takes it. Raises ValueError."""
    if backend != "fla" and (backend != "auto" or os.environ.get("QUIETSTAR_FLA") != "1"):
        return backend
    reason = why_not(*call)
    if reason is not None and backend == "fla":
        raise ValueError(f"thought_delta: backend 'fla' is not available: {reason}")
    return "fla" if reason is None else backend


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
    (B, H, M, E), K, by_channel = v.shape, k.shape[-1], g.shape[-1] > 1
    plan = layout.table(f"fla {K}", partial(_plan, K=K))
    if not len(plan.text):
        return torch.zeros_like(v), torch.zeros_like(v)
    if by_channel:  # the decay is part of the keys
        q, k = (x.repeat_interleave(H // x.shape[1], 1) for x in (q, k))
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, g, beta)]  # [B*M,heads,*]
    scan = partial(_scan, rule or _fla)
    own = [x.index_select(0, plan.own) for x in rows]
    q, k, v, g, beta = own
    if plan.inside is None:
        reads = torch.eye(K, dtype=q.dtype, device=q.device).repeat(plan.anchors, 1)[:, None].expand(-1, q.shape[1], -1)
        decay = None
    else:  # from the anchor to each row
        inside, place = plan.inside
        decay = g.index_select(0, inside.clamp(min=0).flatten()).view(*inside.shape, *g.shape[1:])
        decay = decay.masked_fill((inside < 0)[..., None, None], 0).cumsum(1).flatten(0, 1).index_select(0, place).exp()
        reads = torch.cat([q * decay, k * decay] if by_channel else [q, k])
    out, w, read, _ = scan([x.index_select(0, plan.text) for x in rows], reads, plan.sequences)
    writes, outs = [w], []
    if decay is None:
        states = read.unflatten(0, (plan.anchors, K)).transpose(1, 2)
    else:
        of_q, of_k = (read if by_channel else read * torch.cat([decay, decay])).chunk(2)
        own[2] = v - of_k
    done = 0
    for level in plan.levels:
        some = [x.narrow(0, done, level.rows) for x in own]
        first = states[level.above] if decay is None else None  # whose backward sums in a fixed order
        of_own, w, _, last = scan(some, q[:0], level.sequences, first, level is not plan.levels[-1])
        if last is not None:
            states = torch.cat([states, last])
        outs.append(of_own)
        writes.append(w)
        done += level.rows
    if outs and decay is not None:
        outs[0] = outs[0] + of_q
    where, flat = torch.cat([plan.text, plan.own]), v.new_zeros(B * M, H, E)
    out, w = (flat.index_copy(0, where, torch.cat(x)).view(B, M, H, E).transpose(1, 2) for x in ([out, *outs], writes))
    return out, w


def _scan(
    rule: Rule, rows: list[Tensor], reads: Tensor, sequences: Sequences, state: Tensor | None = None, final: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """out and w of rows, what ``reads`` [m,G,K] read, and the final states."""
    q, k, v, g, beta = rows
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
    o, last = rule(
        q, k, v, g, beta, scale=1.0, initial_state=state, output_final_state=final, cu_seqlens=ends
    )  # fmt: skip
    return o.float(), last


class Sequences(NamedTuple):
    """Sequences of rows and reads: n rows, then n reads of what is before each, then m others, put in order.

    Attributes:
        order: int64 [2n+m].
        ends: int64, where sequences begin and end, from 0 to 2n+m.
    """

    order: Tensor
    ends: Tensor


class Level(NamedTuple):
    """Branches that all follow anchors, or branches of levels before.

    Attributes:
        rows: how many there are.
        sequences: a branch each.
        above: int64 [branches], which state each begins with, among those of the anchors and of all branches before.
    """

    rows: int
    sequences: Sequences
    above: Tensor


class Plan(NamedTuple):
    """Which rows are read, and which are sequences. Numbers of rows are those of [B*M].

    Attributes:
        text: int64 [B*L], the text's rows.
        sequences: its documents, with reads behind anchors.
        own: int64, the branches' rows that are on, level by level.
        anchors: how many differ.
        inside: of each branch its rows among ``own``, [branches,longest], -1 after its end; where ``own`` stand there. None if
            states are read.
        levels: of the branches.
    """

    text: Tensor
    sequences: Sequences
    own: Tensor
    anchors: int
    inside: tuple[Tensor, Tensor] | None
    levels: list[Level]


def _plan(layout: ThoughtLayout, K: int) -> Plan:
    B, L, M, C = layout.B, layout.L, layout.M, layout.branches.C
    table, tree = layout.branches.table.cpu().long(), layout.branches.tree
    anchor, start, length = (table[..., column].flatten() for column in (ANCHOR, START, LENGTH))
    lengths, depth, up = length.tolist(), [0] * (B * C), [-1] * (B * C)
    for c, parent in enumerate([-1] * (B * C) if tree is None else tree[..., PARENT].flatten().tolist()):
        if parent >= 0:  # the nearest one above that has rows
            parent += c // C * C
            up[c] = parent if lengths[parent] else up[parent]
            depth[c] = depth[up[c]] + 1 if up[c] >= 0 else 0
    nodes = torch.tensor([c for _, c in sorted((depth[c], c) for c in range(B * C) if lengths[c])], dtype=torch.int64)
    length, batch = length[nodes], nodes // max(C, 1)
    begin = length.cumsum(0) - length
    of_row = torch.arange(len(nodes)).repeat_interleave(length)
    own = (batch * M + L + start[nodes])[of_row] + torch.arange(len(of_row)) - begin[of_row]
    places, first = (batch * L + anchor[nodes]).unique(return_inverse=True)
    number = {c: len(places) + i for i, c in enumerate(nodes.tolist())}
    above = [number.get(up[c], int(first[i])) for i, c in enumerate(nodes.tolist())]
    levels, done = [], 0
    for size in torch.tensor(depth, dtype=torch.int64)[nodes].bincount().tolist():
        some = slice(done, done + size)
        of_level = torch.arange(size).repeat_interleave(length[some])
        sequences = _sequences(torch.arange(len(of_level)), torch.empty(0), of_level, layout)
        levels.append(Level(len(of_level), sequences, torch.tensor(above[some]).to(layout.device)))
        done += size
    if len(levels) < 2 and 2 * len(own) <= K * len(places):
        behind = (batch * L + anchor[nodes])[of_row].repeat(2)
        rows = pad_sequence(list(torch.arange(len(own)).split(length.tolist())), True, -1) if levels else own[None]
        place = of_row * rows.shape[1] + torch.arange(len(own)) - begin[of_row]
        inside = rows.to(layout.device), place.to(layout.device)
    else:
        behind, inside = places.repeat_interleave(K), None
    t = torch.arange(B * L)
    document = (layout.lo.cpu() == torch.arange(L)).flatten().cumsum(0) - 1
    text = (t + t // max(L, 1) * (M - L)).to(layout.device)
    return Plan(text, _sequences(t, behind, document, layout), own.to(layout.device), len(places), inside, levels)


def _sequences(rows: Tensor, behind: Tensor, sequence: Tensor, layout: ThoughtLayout) -> Sequences:
    """Of rows, 0 to n-1, reads behind some of them, and the number of each row's sequence, ascending."""
    order = torch.cat([3 * rows + 1, 3 * rows, 3 * behind + 2]).argsort(stable=True)
    counts = torch.cat([sequence.repeat(2), sequence[behind.long()]]).bincount()
    return Sequences(order.to(layout.device), pad(counts.cumsum(0), (1, 0)).to(layout.device))
