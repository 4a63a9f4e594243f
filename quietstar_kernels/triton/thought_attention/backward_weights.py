"""The softmax weights, which the backward of thought_attention computes again."""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton._math import LOG2_E, bend


@triton.jit
def weights(qk, lse, scale, softcap, dtype: tl.constexpr):
    """exp(score - lse) of products q·k, and d score / d (scale * q·k).

    ``lse`` is in units of log 2 and has the same rank as qk; ``dtype`` is that of q and k.
    """
    if softcap is None:
        score, slope = qk * (scale * LOG2_E), 1.0
    else:
        capped = bend(qk * (scale / softcap), dtype)
        score, slope = capped * (softcap * LOG2_E), 1 - capped * capped
    return tl.exp2(score - lse), slope
