"""Thoughts that can't know the text: the most frequent one everywhere, and random tokens of the same lengths."""

import torch

from quietstar.evaluation.losses import with_constant_thoughts, with_random_thoughts


def example(thoughts, lengths=None):
    found = {"input_ids": torch.arange(len(thoughts)), "thought_ids": torch.tensor(thoughts)[:, None]}
    return found if lengths is None else found | {"thought_lengths": torch.tensor(lengths)[:, None]}


def test_the_most_frequent_thought_is_everywhere():
    own = [example([[1, 2], [3, 4], [5, 6]]), example([[3, 4], [7, 8]])]
    constant = with_constant_thoughts(own)
    assert [x["thought_ids"].tolist() for x in constant] == [[[[3, 4]]] * 3, [[[3, 4]]] * 2]
    assert all(x["input_ids"] is y["input_ids"] and "thought_lengths" not in x for x, y in zip(constant, own, strict=True))


def test_a_constant_thought_has_one_length():
    own = [example([[3, 4], [3, 4], [3, 4], [5, 6]], [1, 2, 2, 0])]
    (constant,) = with_constant_thoughts(own)
    assert constant["thought_ids"].tolist() == [[[3, 4]]] * 4
    assert constant["thought_lengths"].tolist() == [[2]] * 4


def test_random_thoughts_cover_the_vocabulary_and_keep_lengths():
    own = [example([[1, 2]] * 200, [1] * 200), example([[1, 2]] * 200, [2] * 200)]
    first, second = with_random_thoughts(own, 8, seed=3)
    assert first["thought_ids"].shape == (200, 1, 2) and set(first["thought_ids"].flatten().tolist()) == set(range(8))
    assert not torch.equal(first["thought_ids"], second["thought_ids"])
    assert torch.equal(first["thought_lengths"], own[0]["thought_lengths"])
    again, other = with_random_thoughts(own, 8, seed=3), with_random_thoughts(own, 8, seed=4)
    assert torch.equal(again[1]["thought_ids"], second["thought_ids"])
    assert not torch.equal(other[1]["thought_ids"], second["thought_ids"])
