"""The specification of thought_delta: rows one after another, those of the same place on their paths at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import ThoughtLayout


def thought_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, layout: ThoughtLayout, text: tuple | None
) -> tuple[Tensor, Tensor]:
    """q, k [B,G,rows,K], v [B,H,rows,E], g [B,H,rows,1 or K], beta [B,H,rows,1]; finite, 0 where a row is off.

    Returns out and w [B,H,rows,E]. ``text`` holds k, w and g of the text's rows; the others are then the thoughts' alone.
    """
    B, H, rows, E = v.shape
    first = layout.M - rows
    if text is not None:
        q = torch.cat([torch.zeros_like(text[0]), q], 2)
        k, v, g = (torch.cat(pair, 2) for pair in zip(text, (k, v, g), strict=True))
        beta = None if beta is None else torch.cat([beta.new_zeros(B, H, first, 1), beta], 2)
    q, k = (x.repeat_interleave(H // x.shape[1], 1) for x in (q, k))
    parent = layout.branches.parent_rows()
    place = layout.branches.position_ids()
    live = layout.branches.rows_on()
    # All rows of the batch in one dimension.
    q, k, v, g, *more = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, g, *([] if beta is None else [beta])))
    above = (parent + layout.M * torch.arange(B, device=v.device)[:, None]).flatten()
    given = torch.arange(layout.M, device=v.device).expand(B, -1).flatten() < first
    slot = torch.zeros_like(above)
    found, outs, writes, states = [slot[:0]], [v[:0]], [v[:0]], v.new_zeros(0, H, k.shape[-1], E)
    for step in range(int(place.where(live, -1).max()) + 1 if live.numel() else 0):
        now = (live & (place == step)).flatten().nonzero()[:, 0]
        S = v.new_zeros(len(now), H, k.shape[-1], E) if step == 0 else states[slot[above[now]]]
        S = S * g[now].exp()[..., None]
        w = v[now]
        if more:
            new = more[0][now] * (w - (k[now][..., None] * S).sum(-2))
            w = torch.where(given[now][:, None, None], w, new)
        states = S + k[now][..., None] * w[..., None, :]
        slot[now] = torch.arange(len(now), device=v.device)
        found.append(now)
        outs.append((q[now][..., None] * states).sum(-2))
        writes.append(w)
    order = torch.cat(found)
    out, w = (v.new_zeros(v.shape).index_copy(0, order, torch.cat(x)) for x in (outs, writes))
    out, w = (x.unflatten(0, (B, layout.M))[:, first:].transpose(1, 2) for x in (out, w))
    return out, w
