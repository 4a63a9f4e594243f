"""Which texts are held out: whole ones, or blocks of tokens where there are too few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 20  # texts: a tenth of fewer is not two, which an interval needs
LEAST = 4  # texts or blocks of which two can be held out
SHORTEST = 16  # tokens of a block


@dataclass(frozen=True)
class Split:
    """Token ids int64 [their length] to train on and held out, with the number of the text that each of these is from."""

    train: list[Tensor]
    held_out: list[Tensor]
    sources: list[int]
    in_blocks: bool = False


def whole_texts(count: int, most: int, seed: int) -> list[int]:
    """The numbers of the texts to hold out, in random order: a tenth of ``count``, at least two of four or more."""
    held = min(most, max(2, count // 10)) if count >= LEAST else 0
    return random_order(count, seed)[:held]


def split_texts(ids: list[Tensor], most: int, seed: int) -> Split:
    """Hold out whole texts, ``most`` or fewer."""
    held = whole_texts(len(ids), most, seed)
    training = random_order(len(ids), seed)[len(held) :]
    return Split([ids[i] for i in training], [ids[i] for i in held], held)


def split_blocks(ids: list[Tensor], most: int, seed: int, length: int) -> Split:
    """Hold out blocks of ``length`` tokens, or a twentieth of all if that is less. What is between them is trained on."""
    size = min(length, max(SHORTEST, sum(map(len, ids)) // FEW))
    places = [(i, start) for i, x in enumerate(ids) for start in range(0, len(x) - size + 1, size)]
    held = [places[k] for k in whole_texts(len(places), most, seed)]
    training = []
    for i, x in enumerate(ids):
        begin = 0
        for start in [*sorted(start for text, start in held if text == i), len(x)]:
            training.append(x[begin:start])
            begin = start + size
    return Split(
        [x for x in training if len(x)], [ids[i][start : start + size] for i, start in held], [i for i, _ in held], True
    )


def random_order(count: int, seed: int) -> list[int]:
    """The numbers 0 to ``count`` - 1, shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
