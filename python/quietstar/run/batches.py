"""Which texts a step takes and in what order, and how they become padded batches: functions of (seed, step), no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Batch", "Example", "collate", "mix_seed", "texts_of_step"]

Example = dict[str, Tensor]
Batch = dict[str, Tensor]


def texts_of_step(texts: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the texts of a step: epoch after epoch, each in an order of its own, nothing to remember between steps."""
    chosen = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(place, texts)
        chosen.append(int(_order(texts, seed, epoch)[offset]))
    return chosen


_orders: dict[tuple[int, int, int], Tensor] = {}


def _order(texts: int, seed: int, epoch: int) -> Tensor:
    key = (texts, seed, epoch)
    if key not in _orders:
        _orders.clear()
        generator = torch.Generator().manual_seed(mix_seed(seed, -1 - epoch))
        _orders[key] = torch.randperm(texts, generator=generator)
    return _orders[key]


def mix_seed(seed: int, step: int) -> int:
    """A 63-bit seed from (run seed, step): the finaliser of SplitMix64, so that near numbers give unlike seeds."""
    x = (seed * 0x9E3779B97F4A7C15 + step + 1) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


def _name_texts(rows: Tensor, documents: Tensor | None) -> Tensor:
    """The rows' numbers [B]; of packed documents [B,L], row and place of the first token, so that none share random numbers."""
    if documents is None:
        return rows
    length = documents.shape[1]
    place = torch.arange(length)
    first = documents.diff(prepend=documents[:, :1] - 1) != 0
    return rows[:, None] * length + torch.where(first, place, 0).cummax(1).values


FILL = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": -100,
    "anchors": -1,
    "document_ids": -1,
    "thought_ids": 0,
    "thought_lengths": 0,
    "old_logprob": 0,
}


def collate(examples: list[Example], sequence_ids: list[int], parts: int) -> list[Batch]:
    """Batches of the examples, padded on the right to the longest of all, so that the cut into parts changes nothing."""
    padded: Batch = {}
    examples = [{"attention_mask": torch.ones_like(x["input_ids"]), **x} for x in examples]
    for name in examples[0]:
        longest = max(len(x[name]) for x in examples)
        rows = [
            torch.cat([x[name], x[name].new_full((longest - len(x[name]), *x[name].shape[1:]), FILL[name])]) for x in examples
        ]
        padded[name] = torch.stack(rows)
    padded["sequence_ids"] = _name_texts(torch.tensor(sequence_ids), padded.get("document_ids"))
    cuts = [len(examples) * i // parts for i in range(parts + 1)]
    return [{name: x[a:b] for name, x in padded.items()} for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


def batches_of(examples: Sequence[Example], size: int, device: torch.device) -> Iterator[tuple[range, Batch]]:
    """All examples in order, ``size`` at a time: their numbers, and one batch of them on the device."""
    for start in range(0, len(examples), size):
        chosen = range(start, min(start + size, len(examples)))
        (batch,) = collate([examples[i] for i in chosen], list(chosen), 1)
        yield chosen, {name: x.to(device) for name, x in batch.items()}


def text_of(batch: Batch) -> Batch:
    """The texts alone, without labels, anchors and thoughts: what ``QuietStar.choose_anchors`` takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "document_ids", "sequence_ids") if name in batch}
