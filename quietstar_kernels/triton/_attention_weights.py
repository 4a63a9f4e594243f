"""The softmax weights that thought_attention's backward computes anew."""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton._math import LOG2_E, tanh


@triton.jit
def weights(qk, lse, scale, softcap):
    """exp(score - lse) of products q·k, and d score / d (scale * q·k); ``lse`` in units of log 2, of the same rank as qk."""
    if softcap is None:
        score, slope = qk * (scale * LOG2_E), 1.0
    else:
        capped = tanh(qk * (scale / softcap))
        score, slope = capped * (softcap * LOG2_E), 1 - capped * capped
    return tl.exp2(score - lse), slope
