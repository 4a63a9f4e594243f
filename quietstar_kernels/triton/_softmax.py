"""Steps of the online softmax that attention and decoding share: scores, weights, and values that aren't finite."""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton._math import bend

LOWEST = tl.constexpr(-1e38)  # a row's top before its first key: finite, so that nothing is inf - inf


@triton.jit
def scores(queries, keys, scale, softcap, SLICES: tl.constexpr, PRECISION: tl.constexpr):
    """queries [rows,K] times keys [columns,K]: [rows,columns]. With a soft cap scaled and capped, else not yet scaled.

    SLICES splits K, into at least 16 each. Warps then share the columns of the factors, which in fp32 take too many registers.
    """
    WIDTH: tl.constexpr = max(16, queries.shape[-1] // SLICES)
    COUNT: tl.constexpr = queries.shape[-1] // WIDTH
    if COUNT > 1:
        keys = tl.permute(slices(keys, COUNT), [0, 2, 1])
        s = tl.sum(tl.dot(slices(queries, COUNT), keys, input_precision=PRECISION), 0)
    else:
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    return s if softcap is None else softcap * bend(s * (scale / softcap), queries.dtype)


@triton.jit
def slices(x, COUNT: tl.constexpr):
    """[rows,K] to [COUNT,rows,K/COUNT]."""
    return tl.permute(tl.reshape(x, [x.shape[0], COUNT, x.shape[1] // COUNT]), [1, 0, 2])


@triton.jit
def softmax_step(s, factor, top, total, acc):
    """Weights of new scores, which times ``factor`` are in units of log 2, and the updated top, total and acc.

    The sum of a row's weights so far is ``total`` times 2^top, and its weighted sum of values is ``acc`` times 2^top.
    """
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new_top[:, None])
    decay = tl.exp2(top - new_top)
    return p, new_top, total * decay + tl.sum(p, 1), acc * decay[:, None]


@triton.jit
def without_poison(values):
    """Values [keys,E], 0 for keys that have NaN or infinity, and [keys], NaN for such a key, else 0.

    Adding the latter to the scores makes the rows that see the key NaN. 0 * NaN must not reach the others.
    """
    if values.dtype == tl.float32:
        bits, EXPONENT = values.to(tl.int32, bitcast=True), 0x7F800000
    else:
        bits, EXPONENT = values.to(tl.int16, bitcast=True), 0x7F80 if values.dtype == tl.bfloat16 else 0x7C00
    poisoned = tl.max(bits & EXPONENT, axis=1) == EXPONENT
    return tl.where(poisoned[:, None], 0.0, values), tl.where(poisoned, float("nan"), 0.0)
