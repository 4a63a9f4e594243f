"""Thoughts that name the tokens to predict.

A likelihood reward is gamed by them (arXiv 2506.08007, section 5, says so of Quiet-STaR), so their share is an alarm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import IGNORED

# How many of the next tokens, one after another, make a leak: one or two occur in long thoughts by chance.
LEAK = 4


def following(labels: Tensor, layout: ThoughtLayout, count: int = LEAK) -> Tensor:
    """The labels after each anchor, int64 [B,P,count]; -100 where there is none in the anchor's document, or no anchor.

    Args:
        labels: int64 [B,L], -100 on padding.
    """
    anchor = layout.anchor.long()[:, :, None]
    place = anchor + 1 + torch.arange(count, device=labels.device)
    flat = place.clamp(max=layout.L - 1).flatten(1)
    there = (anchor >= 0) & (place < layout.L) & (layout.lo.gather(1, flat).view(place.shape) <= anchor)
    return torch.where(there, labels.gather(1, flat).view(place.shape), IGNORED)


def leaks(thought_ids: Tensor, thought_lengths: Tensor | None, following: Tensor) -> Tensor:
    """bool [B,P,N]: whether a thought has the next 4 tokens of the text, one after another, anywhere among its sampled tokens.

    False where fewer than 4 are known.

    Args:
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N], None where all have T tokens.
        following: int64 [B,P,F], the next tokens, -100 where there is none.
    """
    T = thought_ids.shape[-1]
    starts = T - LEAK + 1
    if starts < 1 or following.shape[-1] < LEAK:
        return torch.zeros_like(thought_ids[..., 0], dtype=torch.bool)
    next_ids = following[:, :, None, :LEAK]
    found = (next_ids != IGNORED).all(-1, keepdim=True).expand(*thought_ids.shape[:3], starts)
    for i in range(LEAK):
        found = found & (thought_ids[..., i : starts + i] == next_ids[..., i, None])
    if thought_lengths is not None:
        found = found & (torch.arange(starts, device=found.device) <= thought_lengths[..., None] - LEAK)
    return found.any(-1)
