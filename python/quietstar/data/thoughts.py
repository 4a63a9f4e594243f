"""Thoughts that were made beforehand, by this model or another engine: written to files, and trained from."""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from quietstar.checks import sampled
from quietstar.data.thought_files import Record, open_records, write_records
from quietstar.model import QuietStar
from quietstar.rollout import Thoughts
from quietstar.run.batches import Example, batches_of, text_of

# Of a record: what a value is, and how many lists are around it.
FIELDS = {
    "text": ("string", 0),
    "tokenizer": ("string", 0),
    "anchors": ("int32", 1),
    "thought_ids": ("int32", 3),
    "logprob": ("float32", 3),
}
OPTIONAL = ("anchors", "logprob")
# A log-probability may be this much above 0, by rounding.
ROUNDING = 1e-3


def text_hash(input_ids: Tensor) -> str:
    """Names a text [L]: the SHA-256, in hex, of its token ids in decimal with a space between."""
    return _sha256(" ".join(map(str, input_ids.tolist())))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Names what ids mean: the SHA-256, in hex, of a line "id token" for each token, by id; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    return _sha256("".join(f"{i} {token}\n" for i, token in sorted((i, token) for token, i in tokenizer.get_vocab().items())))


def export_thoughts(
    qs: QuietStar,
    examples: Sequence[Example],
    path: str | os.PathLike,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> None:
    """Sample thoughts about every example and write them, in parquet a row group for each batch; renamed into place.

    They are those that ``train`` would sample in a step of this seed, at the anchors of the examples or of the config's policy.

    Args:
        path: ends in .jsonl or .parquet.

    Raises:
        ValueError: those of ``QuietStar.think``, another ending, or parquet without pyarrow.
        OSError: the file could not be written.
    """
    tokenizer = tokenizer_hash(qs.tokenizer)
    with write_records(path, FIELDS) as write:
        batches = batches_of(examples, batch_size, qs.start_embedding.device)
        total = -(-len(examples) // batch_size)
        for chosen, batch in tqdm(batches, desc="thoughts", total=total, leave=False, disable=not progress):
            anchors = batch.get("anchors")
            if anchors is None and qs.thought_config.anchors != "all":
                anchors = qs.choose_anchors(**text_of(batch), seed=seed)
            thoughts = qs.think(**text_of(batch), anchors=anchors, seed=seed, greedy=False)
            write([_record(examples[i], tokenizer, anchors, thoughts, row) for row, i in enumerate(chosen)])


def _record(example: Example, tokenizer: str, anchors: Tensor | None, thoughts: Thoughts, row: int) -> Record:
    P = len(example["input_ids"]) if anchors is None else int((anchors[row] >= 0).sum())
    lengths = thoughts.lengths[row, :P].tolist()

    def ragged(values: Tensor) -> list[list[list[Any]]]:
        pairs = zip(values[row, :P].tolist(), lengths, strict=True)
        return [[one[:length] for one, length in zip(several, own, strict=True)] for several, own in pairs]

    record: Record = {"text": text_hash(example["input_ids"]), "tokenizer": tokenizer}
    if anchors is not None:
        record["anchors"] = anchors[row, :P].tolist()
    return record | {"thought_ids": ragged(thoughts.thought_ids), "logprob": ragged(thoughts.logprob)}


class OfflineThoughts(Sequence[Example]):
    """Examples with the thoughts that a file has about them, as ``train`` takes them.

    Opening reads the file once and checks every record; then a record is read when its example is. Memory holds two numbers
    for each, not the thoughts.

    Args:
        path: a file ending in .jsonl or .parquet; docs/offline-thoughts.md says what is in it.
        examples: what the thoughts are about, in any order. Texts that occur k times have k records.
        qs: its config says N and T, its tokenizer what ids mean.

    Raises:
        ValueError: the first record that is broken, of another tokenizer or of a text that isn't there, by its line or row; a
            text without thoughts; another ending, or parquet without pyarrow.
    """

    def __init__(self, path: str | os.PathLike, examples: Sequence[Example], qs: QuietStar):
        self.path, self.examples, self.config = Path(path), examples, qs.thought_config
        self.vocabulary = qs.lm_head.linear.out_features
        self.tokenizer = tokenizer_hash(qs.tokenizer)
        self.records = open_records(path)
        self.numbers = self._match()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        number = self.numbers[index]
        return self._join(self._where(number), self.records.read(number), self.examples[index])

    def _where(self, number: int) -> str:
        return f"{self.path}: {self.records.unit} {number}"

    def _match(self) -> array[int]:
        """The number of each example's record."""
        numbers = array("q", bytes(8 * len(self.examples)))
        waiting: defaultdict[str, list[int]] = defaultdict(list)
        for i in reversed(range(len(self))):
            waiting[text_hash(self.examples[i]["input_ids"])].append(i)
        first: tuple[int, set[str]] | None = None
        for number, record in self.records:
            where = self._where(number)
            self._check_names(where, record)
            text = record["text"]
            if text not in waiting:
                raise ValueError(f"{where} is about another text than those of the data, or one cut otherwise: {text[:12]}…")
            if not waiting[text]:
                raise ValueError(f"{where} is about a text that has its thoughts already: {text[:12]}…")
            index = waiting[text].pop()
            self._join(where, record, self.examples[index])
            numbers[index] = number
            optional = {name for name in OPTIONAL if record.get(name) is not None}
            first = first or (number, optional)
            if optional != first[1]:
                name, other = min(optional ^ first[1]), f"{self.records.unit} {first[0]}"
                has = f"{other} has none" if name in optional else f"{other} has them"
                raise ValueError(f"{where}: {name} must be in every record or in none, and {has}")
        if missing := numbers.count(0):
            index = numbers.index(0)
            text = text_hash(self.examples[index]["input_ids"])
            raise ValueError(
                f"{self.path}: no thoughts about {missing} of the {len(self)} texts, the first is example {index}: {text[:12]}…"
            )
        return numbers

    def _check_names(self, where: str, record: Any) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be an object with {', '.join(FIELDS)}, got {type(record).__name__}")
        for name in ("text", "tokenizer"):
            if not isinstance(record.get(name), str):
                raise ValueError(f"{where}: {name} must be a hash, got {record.get(name)!r}")
        if record["tokenizer"] != self.tokenizer:
            here, there = (f"{x[:12]}…" if x else "none" for x in (self.tokenizer, record["tokenizer"]))
            raise ValueError(f"{where}: tokenizer must be the model's, {here}, got {there}")

    def _join(self, where: str, record: Record, example: Example) -> Example:
        """The example with what its record says, checked."""
        L, N, T = len(example["input_ids"]), self.config.thoughts, self.config.thought_tokens
        joined = {name: x for name, x in example.items() if name != "anchors"}
        P = L
        if record.get("anchors") is not None:
            anchors = _check_anchors(where, record["anchors"], L)
            P = len(anchors)
            joined["anchors"] = torch.tensor(anchors or [-1])
        lengths, ids = _unpack(where, "thought_ids", record.get("thought_ids"), (P, N, T))
        self._check_ids(where, ids)
        joined["thought_lengths"] = torch.tensor(lengths or [[0] * N])
        on = sampled(joined["thought_lengths"], T)
        joined["thought_ids"] = torch.zeros(on.shape, dtype=torch.int64).masked_scatter(
            on, torch.tensor(ids, dtype=torch.int64)
        )
        if record.get("logprob") is not None:
            same, logprob = _unpack(where, "logprob", record["logprob"], (P, N, T))
            if same != lengths:
                raise ValueError(f"{where}: logprob must have a number for each token of thought_ids")
            _check_logprob(where, logprob)
            if self.config.policy_temperature == 1:  # the temperature that it is told at
                joined["old_logprob"] = torch.zeros(on.shape).masked_scatter(on, torch.tensor(logprob))
        return joined

    def _check_ids(self, where: str, ids: list[Any]) -> None:
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocabulary:
                raise ValueError(f"{where}: thought_ids must be from 0 to V-1={self.vocabulary - 1}, got {i!r}")
        for token in self.config.banned:
            if token in ids:
                raise ValueError(f"{where}: thought_ids must not hold the start- or end-of-thought id {token}")


def _check_anchors(where: str, anchors: Any, L: int) -> list[int]:
    fits = isinstance(anchors, list) and all(type(place) is int and 0 <= place < L for place in anchors)
    if not fits or any(b <= a for a, b in zip(anchors, anchors[1:], strict=False)):
        raise ValueError(f"{where}: anchors must be places from 0 to L-1={L - 1}, ascending, got {_short(anchors)}")
    return anchors


def _unpack(where: str, name: str, values: Any, shape: tuple[int, int, int]) -> tuple[list[list[int]], list[Any]]:
    """Of a field [P][N][at most T]: the lengths [P][N] of its thoughts, and all that is in them in one list."""
    P, N, T = shape
    if not isinstance(values, list) or len(values) != P:
        raise ValueError(f"{where}: {name} must have a list for each of P={P} anchors, got {_count(values)}")
    for several in values:
        if not isinstance(several, list) or len(several) != N:
            raise ValueError(f"{where}: {name} must have N={N} thoughts at an anchor, got {_count(several)}")
        for one in several:
            if not isinstance(one, list) or len(one) > T:
                raise ValueError(f"{where}: {name} must have at most T={T} tokens in a thought, got {_count(one)}")
    lengths = [[len(one) for one in several] for several in values]
    return lengths, [x for several in values for one in several for x in one]


def _check_logprob(where: str, values: list[Any]) -> None:
    for value in values:
        if type(value) not in (float, int) or not -math.inf < value <= ROUNDING:
            raise ValueError(f"{where}: logprob must be log-probabilities, finite and at most 0, got {value!r}")


def _count(values: Any) -> str:
    return str(len(values)) if isinstance(values, list) else type(values).__name__


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}…"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
