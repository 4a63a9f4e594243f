"""sample_token on GPUs: the product, the race and the normaliser in one pass over the vocabulary, with no logits in memory.

A program takes some rows through some tiles of the vocabulary. For each row it keeps the best block so far, with the weights of
the one group of 16 ids that the draw falls in, and the sum of all weights. At the end it writes four numbers per row, and a
second kernel chooses among the programs of a row. There are at most ``PROGRAMS`` programs, or as many as tiles of rows, so that
the memory for these numbers does not grow with rows times vocabulary: it is 8 MB if a tile has 128 rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import reference
from .._options import Head
from ._launch import BY_DESCRIPTOR, Launch, Tiles, cdiv, near, plan
from .configs import SAMPLE_TOKEN, SAMPLE_TOKEN_CHOICE, Config, pick, target

BLOCK = tl.constexpr(128)  # ids that race as one: part of the definition, whatever the tile
GROUP = tl.constexpr(16)  # ids in one of a block's groups
BELOW_ONE = tl.constexpr(1 - 2**-24)  # the fp32 number before 1
WORD = tl.constexpr(2**-32)
PROGRAMS = 4096  # dozens for each multiprocessor, so that few are idle at the end
NEIGHBOURS = tl.constexpr(8)  # tiles of rows that read the same weights at the same time, all but one from L2
BITS = tl.constexpr(math.log2(math.e))  # of one nat
LOWEST = tl.constexpr(-1e30)
INFINITE = tl.constexpr(reference.INFINITE)
TINY = tl.constexpr(1e-30)


def sample_token(hidden: Tensor, head: Head, counters: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Implements ``reference.sample_token``."""
    hidden, head = head.with_positive_scale(hidden)
    weight, bias, _, _, temperature, banned = head
    R, V = hidden.shape[0], weight.shape[0]
    ids, logprob = hidden.new_empty(R, dtype=torch.int64), hidden.new_empty(R, dtype=torch.float32)
    if R == 0:
        return ids, logprob
    hidden, weight = _aligned(hidden), _aligned(weight)
    factor, outer = head.factors
    # A final logit in bits is unit * tanh(inner * x), or unit * x where inner is None.
    inner, unit = (None, factor * BITS.value) if outer is None else (factor, outer * BITS.value)

    config = pick(SAMPLE_TOKEN, hidden.dtype.itemsize, R)
    row_tiles, tiles = cdiv(R, config.blocks["BLOCK_R"]), cdiv(V, config.blocks["BLOCK_V"])
    shift = _shift(weight, bias, banned, tiles * config.blocks["BLOCK_V"])
    share = cdiv(tiles, max(1, PROGRAMS // row_tiles))
    parts = cdiv(tiles, share)
    found = hidden.new_empty(4, parts, R, dtype=torch.float32)
    described = target() in BY_DESCRIPTOR
    known = plan("sample_token", (hidden, weight, shift, counters, seed), inner, unit, temperature == 0, parts)

    def prepare() -> Launch:
        strides = hidden.stride(0), weight.stride(0), *counters.stride()
        numbers = inner, unit, R, V, hidden.shape[1], *strides, row_tiles, parts, share
        return Launch(_draw, (row_tiles * parts,), numbers, {"GREEDY": temperature == 0, "DESCRIBED": described})

    def describe() -> Tiles:
        return [_tiles(hidden, config, "BLOCK_R"), _tiles(weight, config, "BLOCK_V")]

    inputs = known.tiles(config, (hidden, weight), describe) if described else (hidden, weight)
    known.launch("draw", config, (*inputs, shift, counters, found, seed), prepare)

    def prepare_choice() -> Launch:
        return Launch(_choose, (cdiv(R, SAMPLE_TOKEN_CHOICE.blocks["BLOCK_R"]),), (R, parts), {})

    known.launch("choose", SAMPLE_TOKEN_CHOICE, (found, ids, logprob), prepare_choice)
    return ids, logprob


def _shift(weight: Tensor, bias: Tensor | None, banned: list[int], size: int) -> Tensor | None:
    """What is added to each product, fp32 [size]: the bias, and -inf for banned ids and those after the last.

    Each banned id takes one kernel, since copying the list would wait for the device.
    """
    if bias is None and not banned:
        return None
    shift = weight.new_full((size,), -math.inf, dtype=torch.float32)
    shift[: len(weight)] = 0 if bias is None else bias
    for token in banned:
        shift[token].sub_(math.inf)
    return shift


def _aligned(x: Tensor) -> Tensor:
    """x [rows,D], or a copy padded with zeros: D and the stride of rows are multiples of 16, and x is aligned and ``near``."""
    D = x.shape[1]
    if D == 0 or D % 16:
        x = torch.nn.functional.pad(x, (0, 16 - D % 16))
    as_is = x.stride(1) == 1 and x.stride(0) >= D and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return near(x) if as_is else x.clone(memory_format=torch.contiguous_format)


def _tiles(x: Tensor, config: Config, rows: str) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [config.blocks[rows], config.blocks["BLOCK_D"]])


@triton.jit
def _products(hidden, weight, acc, row, first_id, R, V, D, stride_h, stride_w, DESCRIBED: tl.constexpr, BLOCK_D: tl.constexpr):
    """acc [rows,ids] plus the products of the hidden rows from ``row`` and the weights from ``first_id``."""
    if DESCRIBED:
        for start in range(0, D, BLOCK_D):
            acc = tl.dot(hidden.load([row, start]), weight.load([first_id, start]).T, acc, input_precision="ieee")
    else:
        r, v, d = tl.arange(0, acc.shape[0])[:, None], tl.arange(0, acc.shape[1])[:, None], tl.arange(0, BLOCK_D)[None, :]
        h = hidden + tl.cast(row, tl.int64) * stride_h + r * stride_h + d
        w = weight + tl.cast(first_id, tl.int64) * stride_w + v * stride_w + d
        for start in range(0, D, BLOCK_D):
            h_tile = tl.load(h + start, mask=(row + r < R) & (start + d < D), other=0.0)
            w_tile = tl.load(w + start, mask=(first_id + v < V) & (start + d < D), other=0.0)
            acc = tl.dot(h_tile, w_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit(
    do_not_specialize=["R", "V", "stride_cr", "stride_cw", "row_tiles", "parts", "share"],
    do_not_specialize_on_alignment=["seed"],
)
def _draw(
    hidden, weight, shift, counters, found, seed, inner, unit, R, V, D, stride_h, stride_w, stride_cr, stride_cw,
    row_tiles, parts, share, GREEDY: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes ``found`` [4,parts,R]: for each part of the vocabulary and row the best score, its id (the bits of an int32), and,
    to base 2, its logit and the LSE of the part.
    """
    program = tl.program_id(0)
    first_tile = program // (NEIGHBOURS * parts) * NEIGHBOURS
    neighbours = tl.minimum(row_tiles - first_tile, NEIGHBOURS)
    row = (first_tile + program % (NEIGHBOURS * parts) % neighbours) * BLOCK_R
    part = program % (NEIGHBOURS * parts) // neighbours
    rows = row + tl.arange(0, BLOCK_R)
    on = rows < R
    v = tl.arange(0, BLOCK_V)
    counter, stride_cw = counters + rows.to(tl.int64) * stride_cr, tl.cast(stride_cw, tl.int64)
    key = tl.load(seed)

    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    token = tl.zeros([BLOCK_R], tl.int32)
    best_score = tl.full([BLOCK_R], float("-inf"), tl.float32)
    best_rest = tl.zeros([BLOCK_R], tl.float32)
    best_group = tl.zeros([BLOCK_R, GROUP], tl.float32)
    best_level = tl.zeros([BLOCK_R], tl.float32)

    for tile in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(V, BLOCK_V))):
        first_id = tile * BLOCK_V
        if shift is None:
            shift_v = tl.where(first_id + v < V, 0.0, float("-inf"))
        else:
            shift_v = tl.load(shift + first_id + v)
        acc = tl.broadcast_to(shift_v[None, :], [BLOCK_R, BLOCK_V])
        x = _products(hidden, weight, acc, row, first_id, R, V, D, stride_h, stride_w, DESCRIBED, BLOCK_D)
        if inner is not None:
            # tanh to an absolute error of 2^-22, which needs few registers. The last term keeps infinities.
            x = 1.0 - 2.0 / (tl.exp2(x * (2 * BITS * inner)) + 1.0) + TINY * x

        peak = tl.max(x, 1)
        level = tl.maximum(peak * unit, LOWEST)
        if GREEDY:
            argmax = first_id + tl.min(tl.where(x == peak[:, None], v[None, :], BLOCK_V), 1)
            token = tl.where(peak > best_score, argmax, token)
            best_score = tl.maximum(peak, best_score)
        weights = tl.exp2(x * unit - level[:, None])
        if GREEDY:
            weight_sum = tl.sum(weights, 1)
        else:
            sequence = tl.load(counter, mask=on, other=0)
            position = tl.load(counter + stride_cw, mask=on, other=0)
            n = tl.load(counter + 2 * stride_cw, mask=on, other=0)
            thought = (n << 16) + tl.load(counter + 3 * stride_cw, mask=on, other=0)
            score, start, rest, group, weight_sum = race(
                weights, level, key, sequence, position, thought, tile * (BLOCK_V // BLOCK)
            )
            wins = score > best_score
            best_score = tl.where(wins, score, best_score)
            token = tl.where(wins, first_id + start, token)
            best_rest = tl.where(wins, rest, best_rest)
            best_group = tl.where(wins[:, None], group, best_group)
            best_level = tl.where(wins, level, best_level)
        new = tl.maximum(top, level)
        total = total * tl.exp2(top - new) + weight_sum * tl.exp2(level - new)
        top = new

    logit = top
    if not GREEDY:
        column, drawn = resolve(best_group, best_rest)
        token += column
        logit = best_level + tl.log2(tl.maximum(drawn, TINY))
    at, size = found + part.to(tl.int64) * R + rows, parts.to(tl.int64) * R
    tl.store(at, best_score, mask=on)
    tl.store(at + size, token.to(tl.float32, bitcast=True), mask=on)
    tl.store(at + 2 * size, logit, mask=on)
    tl.store(at + 3 * size, top + tl.log2(tl.where(total == 0.0, TINY, total)), mask=on)


@triton.jit(do_not_specialize=["R", "parts"])
def _choose(found, ids, logprob, R, parts, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """The id with the best score of each row, the first if several are equal, and its log-probability over all parts."""
    size = parts.to(tl.int64) * R
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    on = rows < R
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    part = tl.zeros([BLOCK_R], tl.int32)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        at = found + p.to(tl.int64) * R + rows[None, :]
        known = (p < parts) & on[None, :]
        score_p = tl.load(at, mask=known, other=float("-inf"))
        lse_p = tl.load(at + 3 * size, mask=known, other=float("-inf"))
        highest = tl.max(score_p, 0)
        first = tl.min(tl.where(score_p == highest[None, :], p, start + BLOCK_P), 0)
        part = tl.where(highest > best, first, part)
        best = tl.maximum(highest, best)
        new = tl.maximum(top, tl.max(lse_p, 0))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(lse_p - new[None, :]), 0)
        top = new
    at = found + part.to(tl.int64) * R + rows
    token = tl.load(at + size, mask=on, other=0.0).to(tl.int32, bitcast=True)
    drawn = tl.load(at + 2 * size, mask=on, other=0.0)
    lse = top + tl.log2(tl.where(total == 0.0, TINY, total))
    finite = tl.abs(lse) < INFINITE
    tl.store(ids + rows, tl.where(finite, token, -1).to(tl.int64), mask=on)
    tl.store(logprob + rows, tl.where(finite, (drawn - lse) / BITS, float("nan")), mask=on)


@triton.jit
def exponential(word):
    """-log(1 - v) with v = (word + 0.5) / 2^32, to a few ulps for any 32-bit word."""
    v = (word.to(tl.float32) + 0.5) * WORD
    high = v >= 0.5
    # If v is near 1, 1 - v comes from the complement of the word. Else it is rounded to fp32, which hardly changes
    # log(rest) / (1 - rest), and that times v is log(1 - v) (Goldberg 1991, theorem 4).
    rest = tl.where(high, ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * WORD, 1.0 - v)
    gap = 1.0 - rest
    correction = tl.where(high, 1.0, v / tl.where(gap == 0.0, 1.0, gap))
    return tl.where(gap == 0.0, v, -tl.log(rest) * correction)


@triton.jit
def race(weights, level, seed, sequence, position, thought, first_block):
    """One tile's race, as in ``quietstar_kernels.sample_token``; its sums and comparisons are those of ``reference.race``.

    Args:
        weights: [rows,ids] over 2^level, from the first id of block ``first_block``.
        level: [rows].
        seed: int64, the key.
        sequence: int32 [rows], the first word of the counter.
        position: int32 [rows], the second.
        thought: int32 [rows], the third.
        first_block: the fourth, of the tile's first block.

    Returns:
        The score of the winning block [rows], in bits; the first id, in the tile, of the group that the draw falls in, int32
        [rows]; how far into that group it falls, as a sum of weights [rows]; the weights of the group [rows,16]; the sum of
        all weights [rows], NaN if one of them is. A tile without weight has score -inf.
    """
    ROWS: tl.constexpr = weights.shape[0]
    BLOCKS: tl.constexpr = weights.shape[1] // BLOCK
    GROUPS: tl.constexpr = weights.shape[1] // GROUP
    block, group = tl.arange(0, BLOCKS)[None, :], tl.arange(0, GROUPS)
    grouped = tl.reshape(weights, [ROWS, GROUPS, GROUP])

    # A masked sum instead of tl.cumsum, which would move the sums to another layout.
    sums = tl.sum(grouped, 2)
    counts = (group[:, None] <= group[None, :]) & (group[:, None] * GROUP // BLOCK == group[None, :] * GROUP // BLOCK)
    running = tl.reshape(tl.sum(tl.where(counts[None, :, :], sums[:, :, None], 0.0), 1), [ROWS, BLOCKS, BLOCK // GROUP])
    total = tl.max(running, 2)

    word0, word1, _, _ = tl.philox(seed, sequence[:, None], position[:, None], thought[:, None], block + first_block)
    odds = tl.where(total > 0, total, 1.0) / exponential(word0)
    scores = tl.where(total > 0, level[:, None] + tl.log2(odds), float("-inf"))
    score = tl.max(scores, 1)
    winner = block == tl.min(tl.where(scores == score[:, None], block, BLOCKS), 1)[:, None]

    goal = tl.minimum((word1.to(tl.float32) + 0.5) * WORD, BELOW_ONE) * total
    passed = running <= goal[:, :, None]
    drawn = block * (BLOCK // GROUP) + tl.sum(passed.to(tl.int32), 2)
    drawn = tl.sum(tl.where(winner, drawn, 0), 1)
    rest = goal - tl.max(tl.where(passed, running, 0.0), 2)
    rest = tl.sum(tl.where(winner, rest, 0.0), 1)
    here = (group[None, :] == drawn[:, None]).to(tl.float32)
    chosen = tl.sum(grouped * here[:, :, None], 1)  # NaN if any weight of the column is, in whichever group
    return score, drawn * GROUP, rest, chosen, tl.sum(total, 1) + 0.0 * tl.sum(chosen, 1)


@triton.jit
def resolve(weights, rest):
    """The column of a group's weights [rows,16] at which their running sum passes ``rest`` [rows], and its weight.

    Both are 0 in a row without weights.
    """
    column = tl.arange(0, GROUP)[None, :]
    running = tl.cumsum(weights, 1)
    # Rounding may move the draw past the end. Then it falls on the last column that has a weight.
    rest = tl.minimum(rest, tl.max(running, 1) * BELOW_ONE)
    drawn = tl.sum((running <= rest[:, None]).to(tl.int32), 1)
    drawn = tl.where(drawn < GROUP, drawn, 0)
    return drawn, tl.sum(tl.where(column == drawn[:, None], weights, 0.0), 1)
