"""Philox4x32-10 compared with its published answers and with the algorithm in Python integers."""

import pytest
import torch

from quietstar_kernels.philox import draw_words, philox

PUBLISHED = [  # Random123's known answers: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def slow_philox(counter, key):
    """Salmon et al., section 3.3: two 32 x 32 bit products per round; the key is bumped between rounds."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("counter, key, result", PUBLISHED)
def test_published_answers(counter, key, result):
    tensors = tuple(torch.tensor([word]) for word in words(counter))
    assert [int(x) for x in philox(tensors, tuple(words(key)))] == words(result)
    assert slow_philox(words(counter), words(key)) == words(result)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, -1, -(2**63)])
def test_how_counters_block_and_seed_enter(seed):
    counters = torch.tensor(
        [[0, 0, 0, 0], [1, 2, 3, 4], [2**31 - 1, 2**31 - 1, 65535, 65535], [-1, 5, 40000, 7]], dtype=torch.int32
    )
    word0, word1 = draw_words(counters, torch.tensor([0, 1, 2, 4000]), seed)
    for i, (sequence, position, n, s) in enumerate(counters.tolist()):
        for j, block in enumerate([0, 1, 2, 4000]):
            counter = [sequence % 2**32, position, n * 2**16 + s, block]
            key = [seed % 2**32, seed % 2**64 >> 32]
            assert [int(word0[i, j]), int(word1[i, j])] == slow_philox(counter, key)[:2]
