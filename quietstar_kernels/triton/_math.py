"""Numbers and functions that Triton lacks on at least one of its targets."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh of fp32 ``x`` to 6 ulps, by the rational function of Eigen and XLA, degree 13 over degree 6. NaN stays NaN."""
    x = tl.where(x > 7.905311, 7.905311, tl.where(x < -7.905311, -7.905311, x))
    y = x * x
    above = 2.00018790482477e-13 + y * -2.76076847742355e-16
    above = -8.60467152213735e-11 + y * above
    above = 5.12229709037114e-08 + y * above
    above = 1.48572235717979e-05 + y * above
    above = 6.37261928875436e-04 + y * above
    above = 4.89352455891786e-03 + y * above
    below = 1.18534705686654e-04 + y * 1.19825839466702e-06
    below = 2.26843463243900e-03 + y * below
    below = 4.89352518554385e-03 + y * below
    return x * above / below


@triton.jit
def bend(x, dtype: tl.constexpr):
    """tanh of fp32 ``x`` for a soft cap: accurate for fp32 tensors, with an absolute error of 2^-22 for 16-bit ones."""
    if dtype == tl.float32:
        return tanh(x)
    else:  # a third of the instructions; the error is far below the rounding of 16-bit scores
        return 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
