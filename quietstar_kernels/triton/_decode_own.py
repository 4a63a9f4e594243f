"""The first part of a decode tile: the softmax of its rows over the own rows of their thoughts, in one of two ways."""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton._attention_forward import scores, softmax_step, without_poison
from quietstar_kernels.triton._math import tanh
from quietstar_kernels.triton._rows import OWN
from quietstar_kernels.triton._tiles import load_tile


@triton.jit
def over_own_chunks(
    queries, top, total, thought, flat, HG, thoughts, own_first, own, k, v, kt, ks, vt, vs, scale, softcap, factor,
    K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``top``, ``total`` and acc after the rows own_first .. own_first + own - 1 of each row's thought, by matrix products.

    A chunk of 16 flat rows meets 16 own rows of its thoughts at a time: their own rows stand in one sequence here, thought
    after thought. k [P*N,S,K] has the strides kt, ks.
    """
    CHUNKS: tl.constexpr = queries.shape[0] // OWN
    chunk = flat + tl.arange(0, CHUNKS) * OWN
    chunk_first = chunk // HG
    chunk_last = tl.minimum((chunk + OWN - 1) // HG, thoughts - 1)
    blocks = tl.cdiv(tl.max((chunk_last - chunk_first + 1) * own, 0), OWN)
    queries = tl.reshape(queries, [CHUNKS, OWN, queries.shape[1]])
    thought = tl.reshape(thought, [CHUNKS, OWN, 1])
    top, total = tl.reshape(top, [CHUNKS, OWN]), tl.reshape(total, [CHUNKS, OWN])
    acc = tl.zeros([CHUNKS, OWN, BLOCK_E], tl.float32)
    # Addresses hoisted out of the loop would fill the registers.
    for j in tl.range(blocks, num_stages=1, disable_licm=True):
        n = j * OWN + tl.arange(0, OWN)
        of = chunk_first[:, None] + (n // own)[None, :]
        there = of <= chunk_last[:, None]
        at = (own_first + n % own).to(tl.int64)[None, :]
        keys = load_tile(k, of.to(tl.int64) * kt + at * ks, there, K, queries.shape[2])
        values = load_tile(v, of.to(tl.int64) * vt + at * vs, there, E, BLOCK_E)
        s = scores(queries, keys, scale, softcap, SLICES, PRECISION)
        values, poison = without_poison(values)
        s = tl.where(thought == of[:, None, :], s + poison[:, None, :], -float("inf"))
        p, top, total, acc = softmax_step(s, factor, top, total, acc)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    ROWS: tl.constexpr = CHUNKS * OWN
    return tl.reshape(top, [ROWS]), tl.reshape(total, [ROWS]), tl.reshape(acc, [ROWS, BLOCK_E])


@triton.jit
def over_own_rows(
    queries, top, total, thought, on, own_first, own, k, v, kt, ks, vt, vs, scale, softcap, factor,
    K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As ``over_own_chunks``, one own row at a time without matrix products: three of tf32 would fill the registers."""
    acc = tl.zeros([queries.shape[0], BLOCK_E], tl.float32)
    thought = thought.to(tl.int64)
    for j in tl.range(own):
        at = (own_first + j).to(tl.int64)
        keys = load_tile(k + at * ks, thought * kt, on, K, queries.shape[1])
        s = tl.sum(queries * keys, 1)
        s = s if softcap is None else softcap * tanh(s * (scale / softcap))
        p, top, total, acc = softmax_step(s[:, None], factor, top, total, acc)
        acc += p * load_tile(v + at * vs, thought * vt, on, E, BLOCK_E)
    return top, total, acc
