"""Texts from the hub, a file or Python's own documentation, tokenized, split and cut: what ``train`` and ``evaluate`` take.

Problems with chains of thought, made up or from files, are in ``quietstar.tasks``; questions in ``quietstar.questions``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config import option
from quietstar.run.batches import Example

__all__ = ["Data", "DataConfig", "json_lines", "load_data"]

FILES = (".txt", ".jsonl")


@dataclass
class DataConfig:
    """Where the texts come from and how they are cut into examples.

    Raises:
        ValueError: a value outside its range, by name.
    """

    data: str = option("builtin", "a .txt or .jsonl file, a hub name, name:subset on the hub, or builtin: Python's manual")
    text_field: str = option("text", "what a .jsonl file or a hub data set calls the text")
    split: str = option("train", "split of a hub data set")
    hub_texts: int = option(10_000, "texts to read of a hub data set, from its start")
    pack: bool = option(True, "fill examples with text after text; else one text an example, and a line of a .txt is one")
    length: int = option(256, "L, tokens of an example")
    held_out: int = option(64, "texts kept for evaluation, a tenth of all at most")
    held_out_seed: int = option(0, "which texts those are")

    def __post_init__(self) -> None:
        for name, least in (("length", 3), ("held_out", 0), ("hub_texts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"DataConfig: {name} must be {least} or more, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Data:
    """Examples to train on and held-out ones, which are one text each, cut to L tokens."""

    train: list[Example]
    held_out: list[Example]


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, lookahead: int) -> Data:
    """Read, tokenize and split texts. An end-of-text token, where the tokenizer has one, closes each.

    Texts are held out whole, by a random table. Packed examples carry document_ids, so that no text sees another.

    Args:
        lookahead: J; an example has at least J + 2 tokens, and texts too short for one are left out where they stand alone.

    Raises:
        ValueError: data that can't be found, read or decoded, a broken JSON line, or no text of J + 2 tokens.
    """
    if config.length < lookahead + 2:
        raise ValueError(f"length must be at least J+2={lookahead + 2} to look {lookahead} ahead, got L={config.length}")
    ids = tokenize(read_texts(config), tokenizer)
    table = torch.randperm(len(ids), generator=torch.Generator().manual_seed(config.held_out_seed)).tolist()
    held = min(config.held_out, len(ids) // 10)
    held_out, training = [ids[i] for i in table[:held]], [ids[i] for i in table[held:]]
    least = lookahead + 2
    data = Data(
        train=packed(training, config.length, least) if config.pack else alone(training, config.length, least),
        held_out=alone(held_out, config.length, least),
    )
    if not data.train:
        longest = sum(map(len, training)) if config.pack else max(map(len, training))
        raise ValueError(
            f"{config.data}: the text is shorter than the look-ahead: {longest} tokens, and {least} are the least to look "
            f"{lookahead} ahead"
        )
    return data


def read_texts(config: DataConfig) -> list[str]:
    """The texts of ``config.data``, at least one, none of them empty."""
    path = Path(config.data)
    if config.data == "builtin":
        texts = builtin_texts()
    elif path.suffix == ".txt":
        texts = read_utf8(path).splitlines() if not config.pack else re.split(r"\n\s*\n", read_utf8(path))
    elif path.suffix == ".jsonl":
        texts = list(_json_texts(path, config.text_field))
    elif path.exists():
        raise ValueError(f"{path}: expected a file ending in {' or '.join(FILES)}")
    else:
        texts = _hub_texts(config)
    texts = [text.strip("\r\n") for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{config.data}: there is no text in it")
    return texts


def builtin_texts() -> list[str]:
    """Paragraphs of Python's own documentation, each once: its topics repeat each other's."""
    from pydoc_data.topics import topics

    pieces = (" ".join(piece.split()) for text in topics.values() for piece in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(piece for piece in pieces if len(piece) >= 100))


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of each text, int64 [its length], with an end-of-text token where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(texts, verbose=False)["input_ids"]
    return [torch.tensor(x if x[-1:] == end else x + end, dtype=torch.int64) for x in ids]


def packed(ids: list[Tensor], length: int, least: int) -> list[Example]:
    """Texts one after the other, cut every ``length`` tokens; a rest of fewer than ``least`` is left out."""
    if not ids:
        return []
    tokens = torch.cat(ids).split(length)
    documents = torch.repeat_interleave(torch.tensor([len(x) for x in ids])).split(length)
    pairs = zip(tokens, documents, strict=True)
    return [{"input_ids": x, "document_ids": document} for x, document in pairs if len(x) >= least]


def alone(ids: list[Tensor], length: int, least: int) -> list[Example]:
    """One text an example, cut to ``length`` tokens; texts of fewer than ``least`` are left out."""
    return [{"input_ids": x[:length]} for x in ids if len(x) >= least]


def read_utf8(path: Path) -> str:
    """A file's text without a byte order mark; ValueError that names the file and what is wrong."""
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: byte {error.start}, in line {line}, is not UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank; ValueError that names a line which is not JSON."""
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            yield number, json_value(path, number, line)


def json_value(path: Path, number: int, line: str | bytes) -> Any:
    """What the line says; ValueError that names it where it is not JSON."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is not JSON: {error}") from error


def hub_rows(source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    """The first rows of a hub data set, ``name`` or ``name:subset``; ValueError with the reason where there are none."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source!r} is no file here, and data from the hub needs the datasets package: pip install datasets"
        ) from error
    name, _, subset = source.partition(":")
    try:
        return list(islice(datasets.load_dataset(name, subset or None, split=split, streaming=True), limit))
    except Exception as error:  # the library's own, the network's and the file formats' errors, all without a common base
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{source!r} is no file here, and the hub does not give it: {reason}") from error


def _json_texts(path: Path, name: str) -> Iterator[str]:
    for number, value in json_lines(path):
        if not isinstance(value, dict) or not isinstance(value.get(name), str):
            raise ValueError(f"{path}: line {number} has no text in a field {name!r}")
        yield value[name]


def _hub_texts(config: DataConfig) -> list[str]:
    rows = hub_rows(config.data, config.split, config.hub_texts)
    for row in rows:
        if not isinstance(row.get(config.text_field), str):
            raise ValueError(f"{config.data}: no text in a field {config.text_field!r}, it has {', '.join(sorted(row))}")
    return [row[config.text_field] for row in rows]
