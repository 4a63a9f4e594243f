"""The block race of ``sample_token`` over a tile of weights: which block wins, and where the draw falls inside it.

The definition is in ``quietstar_kernels.sample_token``; its sums and comparisons are those of ``reference.race``.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # ids that race as one: part of the definition, whatever the tile
GROUP = tl.constexpr(16)  # ids in one of a block's groups
BELOW_ONE = tl.constexpr(1 - 2**-24)  # the fp32 number before 1
WORD = tl.constexpr(2**-32)


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
    """One tile's race.

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
    rest = tl.minimum(rest, BELOW_ONE * tl.max(running, 1))
    drawn = tl.sum((running <= rest[:, None]).to(tl.int32), 1)
    drawn = tl.where(drawn < GROUP, drawn, 0)
    return drawn, tl.sum(tl.where(column == drawn[:, None], weights, 0.0), 1)
