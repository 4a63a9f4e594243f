"""Scores as thought_attention's backward computes them anew."""

from __future__ import annotations

import triton

from quietstar_kernels.triton._math import LOG2_E, tanh


@triton.jit
def log2_scores(qk, scale, softcap):
    """Of products q·k: the scores in units of log 2, and d score / d (scale * q·k)."""
    if softcap is None:
        score, slope = qk * (scale * LOG2_E), 1.0
    else:
        capped = tanh(qk * (scale / softcap))
        score, slope = capped * (softcap * LOG2_E), 1 - capped * capped
    return score, slope
