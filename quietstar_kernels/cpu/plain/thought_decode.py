"""thought_decode on CPUs: the text as in ``thought_attention``, the own rows by small matmuls without a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._options import AttentionOptions
from ...branches import LENGTH
from ...reference import wide
from ._text import add_sinks, join, plain, sees_text, split, step_chunks, text_forward, without_poison


def thought_decode(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor, lo: Tensor, table: Tensor, step: Tensor,
    options: AttentionOptions, tree: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Implements ``reference.thought_decode``. The row sees its own rows up to itself, or the last ``window`` of them."""
    _, window, _, sinks = options
    G, now = k_text.shape[1], int(step)
    out = q.new_empty((*q.shape[:3], v_text.shape[-1]))
    if q.numel() == 0:
        return out
    k_text, v_text, bad = without_poison(wide(k_text), wide(v_text))
    seen = slice(0 if window is None else max(0, now + 1 - window), now + 1)
    live = (table[..., LENGTH] > now)[:, None, None, :, None]  # [B,1,1,C,1]
    of_tree = None if tree is None else _own_of_tree(q, k_own, v_own, table, tree, now, options)
    for chunk in step_chunks(lo, table, tree, now, window, q.shape[1] // G, wide(q[:0]).dtype):
        rows = split(wide(q[:, :, chunk.rows]), G)  # [B,G,h,c,K]
        if of_tree is None:
            k3, v3 = (wide(x[:, :, chunk.own, seen]).flatten(0, 2) for x in (k_own, v_own))
            o3, l3 = plain(rows.transpose(2, 3).flatten(0, 2), k3, v3, None, options)  # a batch of branches
            o, l = (x.view(*k_own.shape[:2], -1, *x.shape[1:]).transpose(2, 3) for x in (o3, l3))
        else:
            o, l = (x[:, :, :, chunk.own] for x in of_tree)
        join(o, l, *text_forward(rows, k_text, v_text, chunk, options))
        if sinks is not None:
            add_sinks(o, l, sinks)
        if bad is not None:
            o = o.masked_fill(sees_text(bad, chunk)[..., None], torch.nan)
        split(out[:, :, chunk.rows], G).copy_(o.masked_fill(~live[:, :, :, chunk.own], 0))
    return out


def _own_of_tree(
    q: Tensor, k_own: Tensor, v_own: Tensor, table: Tensor, tree: Tensor, now: int, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Out [B,G,h,C,E] and lse [B,G,h,C] of row ``now`` of each node over all rows on its path; 0 where that row is off."""
    heads = wide(split(q, k_own.shape[1]))  # [B,G,h,C,K]
    out, lse = heads.new_zeros((*heads.shape[:4], v_own.shape[-1])), heads.new_zeros(heads.shape[:4])
    for b, (branches, nodes) in enumerate(zip(table.tolist(), tree.tolist(), strict=True)):
        path: list[tuple[int, int, int]] = []  # (node, its rows, the row after its subtree)
        for c, ((_, start, length), (depth, end, *_)) in enumerate(zip(branches, nodes, strict=True)):
            while path and path[-1][2] <= start:
                path.pop()
            if length > now:
                oldest = 0 if options.window is None else max(0, depth + now + 1 - options.window)
                seen = [(a, rows) for a, rows, _ in path] + [(c, now + 1)]
                k, v = (wide(torch.cat([x[b, :, a, :rows] for a, rows in seen], 1)[:, oldest:]) for x in (k_own, v_own))
                out[b, :, :, c], lse[b, :, :, c] = plain(heads[b, :, :, c], k, v, None, options)
            if length:
                path.append((c, length, end))
    return out, lse
