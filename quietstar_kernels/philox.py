"""Philox4x32-10 (Salmon et al., SC 2011), the counter-based generator that sampling is defined by, in integer PyTorch."""

from __future__ import annotations

from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds over four counter words, int64 tensors of 32-bit values that broadcast. Returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The signed 64-bit product wraps, but has the bits of the unsigned one: shift and mask give both halves.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (b >> 32) & _WORD ^ c1 ^ k0, (a >> 32) & _WORD ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def draw_words(counters: Tensor, blocks: Tensor, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """The two random words of each row and vocabulary block, int64 [R,blocks] in [0, 2^32).

    ``counters`` int32 [R,4] = (sequence id, position, n, s). The 128-bit Philox counter is, lowest word first,
    (sequence id, position, n * 2^16 + s, block); the key is (seed mod 2^32, seed div 2^32).
    """
    sequence, position, n, s = (counters.long() & _WORD).unbind(1)
    which = ((n << 16) + s) & _WORD
    words = philox(
        (sequence[:, None], position[:, None], which[:, None], blocks.long()[None, :]), (seed & _WORD, (seed >> 32) & _WORD)
    )
    return words[0], words[1]
