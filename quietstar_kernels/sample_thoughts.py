"""sample_thoughts: draws the tokens of all thoughts with your own model, one packed forward pass per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, Checker, check_instance, check_steps, shown
from .layout import ThoughtLayout
from .sample_token import sample_token

_OP = "sample_thoughts"
Forward = Callable[[Tensor, ThoughtLayout], Tensor]


@torch.no_grad()
def sample_thoughts(
    forward: Forward,
    weight: Tensor,
    layout: ThoughtLayout,
    input_ids: Tensor,
    thought_tokens: int,
    start_id: int,
    seed: int | Tensor,
    sequence_ids: Tensor | None = None,
    **head: Any,
) -> tuple[Tensor, Tensor]:
    """Draw the T tokens of every thought, all thoughts side by side: T packed forward passes, without a cache or a gradient.

    Pass s runs the text and the first s + 1 rows of every thought: the start token and s drawn tokens. It draws with
    ``sample_token`` and the counters (sequence id, position of the anchor counted from lo, n, s), so a thought does not
    depend on the batch or on which other anchors think. ``layout.select`` splits a layout that takes too much memory.

    Args:
        forward: the model, from ids int64 [B,M] and the layout of the pass to last hidden states [B,M,D]. Dropout should be
            off: call ``model.eval()`` first.
        weight: [V,D], of the head.
        layout: where to think. Its number of rows S is at least T; later rows are not run.
        input_ids: integer [B,L], the text.
        thought_tokens: T.
        start_id: the token that starts a thought.
        seed: as in ``sample_token``.
        sequence_ids: integer [B] or [B,L], identifies each text; default the row index.
        head: bias, scale, softcap, temperature, banned and backend, as in ``sample_token``. The start and end tokens
            usually belong in ``banned``.

    Returns:
        thought_ids int64 [B,P,N,T] and logprob fp32 [B,P,N,T], as ``sample_token`` gives them; 0 where the row that draws is
        off.

    Raises:
        TypeError: a layout of another type, or a keyword argument that ``sample_token`` doesn't know.
        ValueError: an argument, or what ``forward`` returns, with a wrong shape, dtype, device or range.
    """
    if not callable(forward):
        raise TypeError(f"{_OP}: forward must be callable, got {shown(forward)}")
    check_instance(_OP, "layout", layout, ThoughtLayout)
    check = Checker(_OP, B=layout.B, L=layout.L)
    check_steps(check, layout.own)
    layout._grid_only(check)
    check.tensor("input_ids", input_ids, "B,L", INTEGERS, layout.device, "layout")
    T = check.integer("thought_tokens", thought_tokens, 1, layout.S, f"from 1 to the layout's rows S={layout.S}")
    start_id = check.integer("start_id", start_id, 0)
    counters = _counters(layout, _sequences(check, sequence_ids, layout))

    text, live, shape = input_ids.long(), layout.live(), (layout.B, layout.P, layout.N)
    tokens = text.new_full((*shape, T + 1), start_id)
    logprob = torch.zeros((*shape, T), device=text.device)
    for s in range(T):
        rows = replace(layout, rows=s + 1, length=layout.length.clamp(max=s + 1))
        # The id of a row whose logits are not finite is -1.
        packed = torch.cat([text, tokens[..., : s + 1].clamp(min=0).flatten(1)], 1)
        hidden = forward(packed, rows)
        Checker(_OP, B=rows.B, M=rows.M).tensor("what forward returns", hidden, "B,M,D", FLOATS, text.device)
        counters[..., 3] = s
        last = rows.predicting(hidden, 1).flatten(0, 3)
        ids, logp = sample_token(last, weight, counters.flatten(0, 2), seed, **head)
        on = live[..., s]
        tokens[..., s + 1] = ids.view(shape).where(on, 0)
        logprob[..., s] = logp.view(shape).where(on, 0)
    return tokens[..., 1:].contiguous(), logprob


def _sequences(check: Checker, sequence_ids: Tensor | None, layout: ThoughtLayout) -> Tensor:
    """[B,P], of the anchors."""
    if sequence_ids is None:
        sequence_ids = torch.arange(layout.B, device=layout.device)
    letters = "B,L" if isinstance(sequence_ids, Tensor) and sequence_ids.ndim == 2 else "B"
    check.tensor("sequence_ids", sequence_ids, letters, INTEGERS, layout.device, "layout")
    if sequence_ids.ndim == 1:
        return sequence_ids[:, None].expand(-1, layout.P)
    if layout.L == 0:  # all thoughts are off
        return torch.zeros_like(layout.anchor)
    return sequence_ids.gather(1, layout.anchor.long().clamp(min=0))


def _counters(layout: ThoughtLayout, sequences: Tensor) -> Tensor:
    """int32 [B,P,N,4] of row 0, whose position id is that of the anchor + 1."""
    position = (layout.split(layout.position_ids())[1][..., 0] - 1).clamp(min=0)
    n = torch.arange(layout.N, device=layout.device)
    parts = torch.broadcast_tensors(sequences[:, :, None], position, n, torch.zeros_like(n))
    return torch.stack(parts, -1).int()
