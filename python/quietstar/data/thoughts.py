"""Thoughts sampled in advance, by this model or another engine: files of them, .jsonl or .parquet, and training on them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from quietstar.data.filtering import ThoughtFilter, best
from quietstar.files.reading import as_type, check_regular, json_value
from quietstar.files.writing import beside
from quietstar.model import QuietStar
from quietstar.objective import sampled
from quietstar.run.batches import Example, batches_of, check_data, check_example, text_of
from quietstar.thinking.rollout import Thoughts
from quietstar_kernels.checks import INTEGERS, file_path, instance, integer, seed_bits, tensor

Record = dict[str, Any]
Write = Callable[[Sequence[Record]], None]
SUFFIXES = (".jsonl", ".parquet")


class JsonLines:
    """One record per line, except blank lines, read by number from 1. Memory holds one number per line."""

    unit = "line"

    def __init__(self, path: Path, kind: Any):
        self.path, self.kind = path, kind
        self.file = open(path, "rb")  # noqa: SIM115, read for as long as this object lives
        self.starts = array("q", accumulate(map(len, self.file), initial=0))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False), 1):
            self.file.seek(start)
            line = self.file.read(end - start)
            if line.strip():
                yield number, self._value(number, line)

    def read(self, number: int) -> Any:
        self.file.seek(self.starts[number - 1])
        return self._value(number, self.file.readline())

    def _value(self, number: int, line: bytes) -> Any:
        where = f"{self.path}: line {number}"
        return as_type(self.kind, json_value(line, where), where)


class ParquetRows:
    """One record per row. Memory holds one whole row group at a time, so small groups are best."""

    unit = "row"

    def __init__(self, path: Path, kind: Any):
        parquet = _parquet(path)
        self.path, self.kind = path, kind
        try:
            self.file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a parquet file: {error}") from error
        sizes = (self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups))
        self.starts = list(accumulate(sizes, initial=0))
        self.group = lru_cache(maxsize=1)(self._read_group)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return ((number, self.read(number)) for number in range(1, self.starts[-1] + 1))

    def read(self, number: int) -> Any:
        group = bisect_right(self.starts, number - 1) - 1
        row = self.group(group).slice(number - 1 - self.starts[group], 1).to_pylist()[0]
        return as_type(self.kind, row, f"{self.path}: row {number}")

    def _read_group(self, group: int) -> Any:
        try:
            return self.file.read_row_group(group)
        except (OSError, ValueError) as error:
            first, last = self.starts[group] + 1, self.starts[group + 1]
            raise ValueError(f"{self.path}: rows {first} to {last} are damaged: {error}") from error


def open_records(path: str | os.PathLike, kind: Any = Any) -> JsonLines | ParquetRows:
    """The records of a file."""
    path = _checked(path)
    check_regular(path)
    try:
        return JsonLines(path, kind) if path.suffix == ".jsonl" else ParquetRows(path, kind)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


@contextmanager
def write_records(path: str | os.PathLike, columns: dict[str, tuple[str, int]]) -> Iterator[Write]:
    """A function that writes a batch of records, in parquet as a row group. The file is renamed into place at the end.

    Args:
        columns: for each field its name and, for parquet, the type of its values and how deeply lists nest them.
    """
    path = _checked(path)
    if path.suffix == ".jsonl":
        with beside(path) as file, open(file, "w", encoding="utf-8") as lines:
            yield lambda records: lines.writelines(json.dumps(record) + "\n" for record in records)
        return
    parquet = _parquet(path)
    import pyarrow

    def kind(value: str, lists: int) -> Any:
        return pyarrow.list_(kind(value, lists - 1)) if lists else getattr(pyarrow, value)()

    schema = pyarrow.schema([(name, kind(*column)) for name, column in columns.items()])
    with beside(path) as file, parquet.ParquetWriter(file, schema) as rows:
        yield lambda records: rows.write_table(pyarrow.Table.from_pylist(list(records), schema))


def _checked(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file ending in {' or '.join(SUFFIXES)}")
    return path


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet files need pyarrow (pip install pyarrow); .jsonl files don't") from error
    return pyarrow.parquet


# Fields of a record: the type of their values, and how deeply lists nest them.
FIELDS = {
    "text": ("string", 0),
    "tokenizer": ("string", 0),
    "anchors": ("int32", 1),
    "thought_ids": ("int32", 3),
    "logprob": ("float32", 3),
}
OPTIONAL = ("anchors", "logprob")
GAIN = {"gain": ("float32", 2)}  # written with thoughts that were chosen by it, and not read


class ThoughtRecord(msgspec.Struct):
    """What must be in a file of thoughts; other fields are ignored."""

    text: str
    tokenizer: str
    thought_ids: list[list[list[int]]]
    anchors: list[int] | None = None
    logprob: list[list[list[float]]] | None = None


# How far above 0 rounding may put a log-probability.
ROUNDING = 1e-3


def text_hash(input_ids: Tensor) -> str:
    """The id of a text [L]: the SHA-256, in hex, of its token ids in decimal, separated by spaces.

    Raises:
        ValueError: not a tensor of integers.
    """
    if tensor("input_ids", input_ids, "L", {}, dtypes=INTEGERS).is_meta:
        raise ValueError("input_ids must have values, got a tensor on meta")
    return _sha256(" ".join(map(str, input_ids.tolist())))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The id of a vocabulary: the SHA-256, in hex, of a line "id token" per token, by id; empty without a tokenizer.

    Raises:
        ValueError: another object.
    """
    if tokenizer is None:
        return ""
    instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
    return _sha256("".join(f"{i} {token}\n" for i, token in sorted((i, token) for token, i in tokenizer.get_vocab().items())))


def export_thoughts(
    qs: QuietStar,
    examples: Sequence[Example],
    path: str | os.PathLike,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
    wanted: ThoughtFilter | None = None,
) -> Counter[str]:
    """Sample thoughts about every example and write them to a file, which is renamed into place at the end.

    They are the thoughts that ``train`` would sample in a step with this seed, at the examples' anchors or at those that the
    config chooses. In parquet, each batch is a row group.

    Args:
        path: ends in .jsonl or .parquet.
        wanted: which thoughts to write, with their gains; default all, without a gain.

    Returns:
        With ``wanted.keep``, how many thoughts were sampled, kept and, by reason, left out.

    Raises:
        ValueError: as in ``QuietStar.think``, and as in ``forward`` with ``wanted.keep``, which must be at most N; the path
            has another ending, or is parquet and pyarrow is not installed.
        OSError: the file could not be written.
    """
    tokenizer = tokenizer_hash(instance("qs", qs, QuietStar).tokenizer)
    check_data("examples", examples)
    seed, batch_size = seed_bits("seed", seed), integer("batch_size", batch_size, 1)
    wanted = ThoughtFilter() if wanted is None else instance("wanted", wanted, ThoughtFilter)
    N, counts = qs.thought_config.thoughts, Counter[str]()
    if wanted.keep > N:
        raise ValueError(f"keep must be at most N={N}, the thoughts that are sampled at an anchor, got {wanted.keep}")
    with write_records(file_path("path", path), FIELDS | (GAIN if wanted.keep else {})) as write:
        batches = batches_of(examples, batch_size, qs.start_embedding.device)
        total = -(-len(examples) // batch_size)
        for chosen, batch in tqdm(batches, desc="thoughts", total=total, leave=False, disable=not progress):
            anchors = batch.get("anchors")
            if anchors is None and qs.thought_config.anchors != "all":
                anchors = qs.choose_anchors(**text_of(batch), seed=seed)
            thoughts, gain = qs.think(**text_of(batch), anchors=anchors, seed=seed, greedy=False), None
            if wanted.keep:
                anchors, thoughts, gain, found = best(qs, batch, anchors, thoughts, wanted)
                counts.update(found)
            write([_record(examples[i], tokenizer, anchors, thoughts, gain, row) for row, i in enumerate(chosen)])
    return counts


def _record(
    example: Example, tokenizer: str, anchors: Tensor | None, thoughts: Thoughts, gain: Tensor | None, row: int
) -> Record:
    P = len(example["input_ids"]) if anchors is None else int((anchors[row] >= 0).sum())
    lengths = thoughts.lengths[row, :P].tolist()

    def ragged(values: Tensor) -> list[list[list[Any]]]:
        pairs = zip(values[row, :P].tolist(), lengths, strict=True)
        return [[one[:length] for one, length in zip(several, own, strict=True)] for several, own in pairs]

    record: Record = {"text": text_hash(example["input_ids"]), "tokenizer": tokenizer}
    if anchors is not None:
        record["anchors"] = anchors[row, :P].tolist()
    if gain is not None:
        record["gain"] = gain[row, :P].tolist()
    return record | {"thought_ids": ragged(thoughts.thought_ids), "logprob": ragged(thoughts.logprob)}


class OfflineThoughts(Sequence[Example]):
    """Examples for ``train`` with the thoughts that a file has about them.

    Opening reads the file once and checks every record. After that, a record is read when its example is. Memory holds two
    numbers per record, not the thoughts.

    Args:
        path: a file ending in .jsonl or .parquet; docs/training.md describes its records.
        examples: the texts of the thoughts, in any order. A text that occurs k times has k records.
        qs: its config gives N and T, its tokenizer the vocabulary.

    Raises:
        ValueError: a record is broken, has another tokenizer or is about an unknown text (the first one is named by its line or
            row), or a text has no thoughts; errors of ``open_records``.
    """

    def __init__(self, path: str | os.PathLike, examples: Sequence[Example], qs: QuietStar):
        check_data("examples", examples)
        instance("qs", qs, QuietStar)
        self.path, self.examples, self.config = Path(file_path("path", path)), examples, qs.thought_config
        self.vocabulary = qs.lm_head.linear.out_features
        self.tokenizer = tokenizer_hash(qs.tokenizer)
        self.records = open_records(path, ThoughtRecord)
        self.numbers = self._match()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        number = self.numbers[index]
        return self._join(self._where(number), self.records.read(number), self.examples[index])

    def _where(self, number: int) -> str:
        return f"{self.path}: {self.records.unit} {number}"

    def _match(self) -> array[int]:
        """The number of each example's record, after a check of every record."""
        numbers = array("q", bytes(8 * len(self.examples)))
        waiting: defaultdict[str, list[int]] = defaultdict(list)
        for i in reversed(range(len(self))):
            waiting[text_hash(check_example("examples", self.examples[i])["input_ids"])].append(i)
        first: tuple[int, set[str]] | None = None
        for number, record in self.records:
            where = self._where(number)
            if record.tokenizer != self.tokenizer:
                here, there = (f"{x[:12]}…" if x else "none" for x in (self.tokenizer, record.tokenizer))
                raise ValueError(f"{where}: tokenizer must be the model's, {here}, got {there}")
            digest = record.text
            if digest not in waiting:
                raise ValueError(
                    f"{where} is about a text that the data does not have, or one that was cut differently: {digest[:12]}…"
                )
            if not waiting[digest]:
                raise ValueError(f"{where} is about a text that already has its thoughts: {digest[:12]}…")
            index = waiting[digest].pop()
            self._join(where, record, self.examples[index])
            numbers[index] = number
            optional = {name for name in OPTIONAL if getattr(record, name) is not None}
            first = first or (number, optional)
            if optional != first[1]:
                name, other = min(optional ^ first[1]), f"{self.records.unit} {first[0]}"
                has = f"{other} has none" if name in optional else f"{other} has them"
                raise ValueError(f"{where}: {name} must be in every record or in none, and {has}")
        if missing := numbers.count(0):
            index = numbers.index(0)
            digest = text_hash(self.examples[index]["input_ids"])
            raise ValueError(
                f"{self.path}: no thoughts about {missing} of the {len(self)} texts, the first is example {index}: "
                f"{digest[:12]}…"
            )
        return numbers

    def _join(self, where: str, record: ThoughtRecord, example: Example) -> Example:
        """The example with its record's thoughts, after a check of the record."""
        L, N, T = len(example["input_ids"]), self.config.thoughts, self.config.thought_tokens
        joined = {name: x for name, x in example.items() if name != "anchors"}
        P = L
        if record.anchors is not None:
            anchors, P = record.anchors, len(record.anchors)
            if not all(0 <= place < L for place in anchors) or any(b <= a for a, b in pairwise(anchors)):
                got = str(anchors) if len(str(anchors)) < 60 else f"{str(anchors)[:57]}…"
                raise ValueError(f"{where}: anchors must be positions from 0 to L-1={L - 1}, ascending, got {got}")
            joined["anchors"] = torch.tensor(anchors or [-1])
        lengths, ids = _unpack(where, "thought_ids", record.thought_ids, (P, N, T))
        self._check_ids(where, ids)
        joined["thought_lengths"] = torch.tensor(lengths or [[0] * N])
        on = sampled(joined["thought_lengths"], T)
        joined["thought_ids"] = torch.zeros(on.shape, dtype=torch.int64).masked_scatter(
            on, torch.tensor(ids, dtype=torch.int64)
        )
        if record.logprob is not None:
            same, logprob = _unpack(where, "logprob", record.logprob, (P, N, T))
            if same != lengths:
                raise ValueError(f"{where}: logprob must have a number for each token of thought_ids")
            for value in logprob:
                if not -math.inf < value <= ROUNDING:
                    raise ValueError(f"{where}: logprob must be log-probabilities, finite and at most 0, got {value!r}")
            if self.config.policy_temperature == self.config.temperature:  # that of the file's log-probabilities
                joined["old_logprob"] = torch.zeros(on.shape).masked_scatter(on, torch.tensor(logprob))
        return joined

    def _check_ids(self, where: str, ids: list[int]) -> None:
        for i in ids:
            if not 0 <= i < self.vocabulary:
                raise ValueError(f"{where}: thought_ids must be from 0 to V-1={self.vocabulary - 1}, got {i!r}")
        for token in self.config.banned:
            if token in ids:
                raise ValueError(f"{where}: thought_ids must not hold the start- or end-of-thought id {token}")


def _unpack(
    where: str, name: str, values: list[list[list[Any]]], shape: tuple[int, int, int]
) -> tuple[list[list[int]], list[Any]]:
    """The lengths [P][N] of the thoughts in a field [P][N][at most T], and their values in one list."""
    P, N, T = shape
    if len(values) != P:
        raise ValueError(f"{where}: {name} must have a list for each of P={P} anchors, got {len(values)}")
    for several in values:
        if len(several) != N:
            raise ValueError(f"{where}: {name} must have N={N} thoughts at an anchor, got {len(several)}")
        for one in several:
            if len(one) > T:
                raise ValueError(f"{where}: {name} must have at most T={T} tokens in a thought, got {len(one)}")
    lengths = [[len(one) for one in several] for several in values]
    return lengths, [x for several in values for one in several for x in one]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
