"""thought_decode on CPUs: the text as in ``thought_attention``, the own rows by small matmuls without a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.cpu.plain._chunks import by_thought, from_thought, split, step_chunks
from quietstar_kernels.cpu.plain._parts import add_sinks, join, plain, sees_text, text_forward, without_poison
from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.reference import wide


def thought_decode(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    layout: ThoughtLayout,
    step: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """As ``reference.thought_decode``. The row sees its own rows up to itself, or the last ``window`` of them."""
    _, window, _, sinks = options
    G, now = k_text.shape[1], int(step)
    out = q.new_empty((*q.shape[:3], v_text.shape[-1]))
    if q.numel() == 0:
        return out
    k_text, v_text, bad = without_poison(wide(k_text), wide(v_text))
    seen = slice(0 if window is None else max(0, now + 1 - window), now + 1)
    live = layout.live()[..., now].flatten(1)[:, None, None, :, None]  # [B,1,1,P*N,1]
    for chunk in step_chunks(layout, now, window, q.shape[1] // G, wide(q[:0]).dtype):
        rows = split(wide(q[:, :, chunk.rows]), G, 1)
        k3, v3 = (wide(x[:, :, chunk.thoughts, seen]).flatten(0, 2) for x in (k_own, v_own))
        o3, l3 = plain(by_thought(rows), k3, v3, None, options)
        o, l = from_thought(o3, rows.shape), from_thought(l3, rows.shape)
        join(o, l, *text_forward(rows, k_text, v_text, chunk, options))
        if sinks is not None:
            add_sinks(o, l, sinks)
        if bad is not None:
            o = o.masked_fill(sees_text(bad, chunk)[..., None], torch.nan)
        split(out[:, :, chunk.rows], G, 1).copy_(o.masked_fill(~live[:, :, :, chunk.thoughts, :, None], 0))
    return out
