"""The parts of a decode tile: one softmax over own rows, then over text, with the running maximum in units of log2.

A state is (acc, m, l): the weighted sum of values, the largest score and the sum of weights of the rows so far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton._math import tanh


@triton.jit
def cap(s, unit, cap_in, cap_out, CAPPED: tl.constexpr):
    """Scores in units of log2 from dot products: ``s * unit``, or soft-capped."""
    if CAPPED:
        return tanh(s * cap_in) * cap_out
    return s * unit


@triton.jit
def attend(acc, m, l, s, v, AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """The state after keys of scores ``s`` and values ``v``, both with the keys along AXIS, the last of s."""
    top = tl.maximum(m, tl.max(s, AXIS))
    p = tl.exp2(s - tl.expand_dims(top, AXIS))
    fade = tl.exp2(m - top)
    acc = tl.dot(p.to(v.dtype), v, acc * tl.expand_dims(fade, AXIS), input_precision=PRECISION)
    return acc, top, l * fade + tl.sum(p, AXIS)
