"""Thoughts that can't know the text: one and the same everywhere, and random tokens.

Like another text's thoughts in ``controls``, they show what a model gains from mixing in any thought at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar.arguments.values import integer
from quietstar.run.batches import Example, mix_seed

__all__ = ["with_constant_thoughts", "with_random_thoughts"]


def with_constant_thoughts(examples: Sequence[Example]) -> list[Example]:
    """The examples of ``with_own_thoughts``, with the most frequent of all their thoughts at every place.

    Raises:
        ValueError: there are no examples.
    """
    _check("with_constant_thoughts", examples)
    # A thought and its length, if it has one, in one row.
    found = torch.cat([_rows(example) for example in examples])
    thoughts, counts = found.unique(dim=0, return_counts=True)
    most_frequent = thoughts[counts.argmax()]
    T = examples[0]["thought_ids"].shape[-1]
    constant = []
    for example in examples:
        row = most_frequent.expand(len(example["thought_ids"]), -1)
        lengths = {"thought_lengths": row[:, T:]} if "thought_lengths" in example else {}
        constant.append({**example, "thought_ids": row[:, None, :T], **lengths})
    return constant


def with_random_thoughts(examples: Sequence[Example], vocabulary: int, seed: int = 0) -> list[Example]:
    """The examples of ``with_own_thoughts``, with tokens drawn uniformly from the vocabulary; thoughts keep their lengths.

    Args:
        vocabulary: V, the number of tokens.

    Raises:
        ValueError: there are no examples, or the vocabulary is empty.
    """
    _check("with_random_thoughts", examples)
    vocabulary = integer("with_random_thoughts: vocabulary", vocabulary, 1)
    found = []
    for number, example in enumerate(examples):
        generator = torch.Generator().manual_seed(mix_seed(seed, number))
        ids = torch.randint(vocabulary, example["thought_ids"].shape, generator=generator)
        found.append({**example, "thought_ids": ids})
    return found


def _rows(example: Example) -> torch.Tensor:
    """int64 [P,T] or, with lengths, [P,T+1]."""
    ids = example["thought_ids"][:, 0]
    return torch.cat([ids, example["thought_lengths"].long()], 1) if "thought_lengths" in example else ids


def _check(name: str, examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError(f"{name}: examples must be 1 or more, got none")
