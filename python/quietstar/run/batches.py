"""The texts of each step as padded batches. All of it is a function of (seed, step), without state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quietstar.texts import COLUMNS
from quietstar_kernels.checks import refusal, tensor

MOST = 2**20  # texts of a step

Example = dict[str, Tensor]
Batch = dict[str, Any]  # columns of ``quietstar.texts.COLUMNS``, and sequence_ids


def texts_of_step(texts: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the texts of a step. Each epoch goes through all texts in a new random order.

    Args:
        texts: how many texts there are.
    """
    if batch_size > MOST:
        raise refusal("batch_size", f"at most {MOST:,}", batch_size)
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, texts)
        chosen.append(int(_order(texts, seed, epoch)[offset]))
    return chosen


@lru_cache(maxsize=1)
def _order(texts: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(texts, generator=torch.Generator().manual_seed(mix_seed(seed, -1 - epoch)))


def mix_seed(seed: int, step: int) -> int:
    """A 63-bit seed from (run seed, step), by the finaliser of SplitMix64, so that similar inputs give unrelated seeds."""
    x = (seed * 0x9E3779B97F4A7C15 + step + 1) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


def make_sequence_ids(rows: Tensor, document_ids: Tensor | None) -> Tensor:
    """An id for each row [B], or for each packed document [B,L], so that no two of them share random numbers.

    A document's id is made of its row and the position of its first token.
    """
    if document_ids is None:
        return rows
    length = document_ids.shape[1]
    position = torch.arange(length, device=rows.device)
    first = document_ids.diff(prepend=document_ids[:, :1] - 1) != 0
    return rows[:, None] * length + torch.where(first, position, 0).cummax(1).values


def check_data(name: str, data: Sequence[Example]) -> None:
    """Raises ValueError for anything but examples by index; each is checked when it is read."""
    by_index = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not by_index or isinstance(data, (str, bytes, Mapping, Tensor, type)):
        raise refusal(name, "examples by index", data)


def check_example(name: str, example: Example) -> Example:
    """Raises ValueError for anything but columns that ``collate`` knows."""
    if not isinstance(example, Mapping) or "input_ids" not in example:
        raise refusal(f"{name}: each example", "a dict with input_ids", example)
    for column, values in example.items():
        if column not in COLUMNS:
            raise ValueError(f"{name}: an example may have {', '.join(COLUMNS)}, got {column!r}")
        tensor(f"{name}: {column}", values, COLUMNS[column].letters[2:], {})
    return example


def _check_alike(name: str, examples: Sequence[Example]) -> None:
    """Raises ValueError unless the examples can be stacked once they are padded."""
    first = check_example(name, examples[0])
    for example in examples[1:]:
        if check_example(name, example).keys() != first.keys():
            raise ValueError(f"{name}: each example must have {', '.join(first)}, got {', '.join(example)}")
        for column, x in example.items():
            if x.shape[1:] != first[column].shape[1:] or x.dtype != first[column].dtype:
                raise ValueError(f"{name}: {column} must be alike in all, got {_kind(first[column])} and {_kind(x)}")


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def collate(examples: list[Example], sequence_ids: list[int], parts: int, argument: str = "examples") -> list[Batch]:
    """Batches of the examples, padded on the right to the longest of all, so that the number of parts changes nothing.

    Args:
        sequence_ids: one for each example; thoughts are sampled from (seed, sequence id, position).
        parts: how many batches to split the examples into; empty ones are left out.
        argument: what an error calls the examples.
    """
    _check_alike(argument, examples)
    padded: Batch = {}
    examples = [{"attention_mask": torch.ones_like(x["input_ids"]), **x} for x in examples]
    for name in examples[0]:
        padded[name] = pad_sequence([x[name] for x in examples], batch_first=True, padding_value=COLUMNS[name].padding)
    padded["sequence_ids"] = make_sequence_ids(torch.tensor(sequence_ids), padded.get("document_ids"))
    cuts = [len(examples) * i // parts for i in range(parts + 1)]
    return [{name: x[a:b] for name, x in padded.items()} for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


def batches_of(examples: Sequence[Example], size: int, device: torch.device) -> Iterator[tuple[range, Batch]]:
    """All examples in order, ``size`` at a time: their indices, and a batch of them on the device."""
    for start in range(0, len(examples), size):
        chosen = range(start, min(start + size, len(examples)))
        (batch,) = collate([examples[i] for i in chosen], list(chosen), 1)
        yield chosen, {name: moved(x, device) for name, x in batch.items()}


def moved(x: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what is queued there."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)


def text_of(batch: Batch) -> Batch:
    """The inputs of ``QuietStar.choose_anchors``: the texts, without labels, anchors and thoughts."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "document_ids", "sequence_ids") if name in batch}
