"""The optimizer of the recipes, and one clipped step of it."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the module's trainable parameters."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=learning_rate, weight_decay=weight_decay)


def clipped_step(optimizer: torch.optim.Optimizer, module: nn.Module, clip: float, where: str) -> float:
    """Clip the gradient to the norm ``clip`` and take a step; returns the norm before clipping.

    Args:
        where: names the recipe and the update in the error, such as "score: update 3".

    Raises:
        FloatingPointError: a gradient that is not finite; no step is taken.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip))
    if not math.isfinite(norm):
        raise FloatingPointError(f"{where}: the norm of the gradient is {norm}")
    optimizer.step()
    return norm
