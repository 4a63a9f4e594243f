"""Rows of files, folders, patterns, standard input and the hub, each with the place that an error names."""

from __future__ import annotations

import csv
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any

from quietstar.files.reading import check_regular, decoded, json_value, numbered_lines, read_utf8, reason_of

TEXT, JSON, TABLES = (".txt", ".txt.gz"), (".jsonl", ".json", ".jsonl.gz", ".json.gz"), (".csv", ".parquet")
FILES = TEXT + JSON + TABLES
BUILTIN, STDIN = "builtin", "-"
MOST = 100_000  # files and folders within one folder
SPLIT = re.compile(r"(?:^|[^a-z])(train|test|valid|validation|dev)(?![a-z])", re.IGNORECASE)
CHAIN_MARK = "||"  # between a question and its chain, in the published files of implicit chain of thought


def names(data: str) -> list[str]:
    """The sources in ``data``, between commas; the name of a file may have commas itself."""
    return [data] if os.path.exists(data) else re.split(r",(?!\])", data)


def joined(several: Sequence[str]) -> str:
    """Several names as one text."""
    return ",".join(x.replace(",", "[,]") if os.path.exists(x) else x for x in several)


def from_hub(name: str) -> bool:
    return name not in (BUILTIN, STDIN) and not (name.endswith(FILES) or os.path.exists(name) or set(name) & set("*?["))


def absolute(data: str) -> str:
    """The same with whole paths."""
    return ",".join(x if x in (BUILTIN, STDIN) or from_hub(x) else os.path.abspath(x) for x in names(data))


def sources(data: str) -> list[str]:
    """The names in ``data``, with the files of a folder or a pattern in its place, sorted.

    Raises:
        ValueError: there is no file of data in a folder or of a pattern, or a folder has several splits.
    """
    return [source for name in names(data) for source in _expanded(name)]


def _expanded(name: str) -> list[str]:
    if os.path.isdir(name):
        return _files_of(name)
    if from_hub(name) or os.path.exists(name) or not set(name) & set("*?["):
        return [name]
    if not (found := sorted(glob(name, recursive=True))):
        raise ValueError(f"{name}: no file has such a name")
    return [source for path in found for source in _expanded(path)]


def _files_of(folder: str) -> list[str]:
    walk = (Path(root, x) for root, _, files in os.walk(folder) for x in files)
    within = list(islice(walk, MOST + 1))
    if len(within) > MOST:
        raise ValueError(f"{folder}: more than {MOST:,} files are in it: name some, or give a pattern")
    within = sorted(x for x in within if not any(part.startswith(".") for part in x.relative_to(folder).parts))
    found = [str(x) for x in within if x.name.endswith(FILES)]
    if not found:
        raise ValueError(f"{folder}: the folder has no file ending in {', '.join(FILES)}")
    splits = {match[1].lower(): x for x in found if (match := SPLIT.search(os.path.relpath(x, folder)))}
    if len(splits) > 1:
        raise ValueError(f"{folder}: it has files of several splits, {' and '.join(splits.values())}: name those to read")
    if left := [x.name for x in within if str(x) not in found]:
        _warn(f"{folder}: {len(left)} files are not read, such as {left[0]}")
    return found


@cache
def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("standard input must be a pipe or a file, and of one process: give a file's name instead of -")
    return decoded(sys.stdin.buffer.read(), "standard input")


def text_of(source: str) -> str | None:
    """The text of a source that has text instead of rows."""
    if source == STDIN:
        return None if _stdin().lstrip()[:1] in ("{", "[") else _stdin()
    return read_utf8(source) if source.endswith(TEXT) else None


def rows(source: str, split: str, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """Place and value of each row of one of ``sources``. Of text, a row is a line: a question, ``||``, its chain and answer.

    Args:
        split, limit: of a hub data set, and how many of its rows are read.

    Raises:
        ValueError: it can't be read, or a row is damaged.
    """
    if from_hub(source):
        found = hub_rows(source, split, limit)
        return ((f"{source}: row {number}", _without_null(row)) for number, row in enumerate(found, 1))
    if source != STDIN and not source.endswith(FILES):
        check_regular(source)
        raise ValueError(f"{source}: expected a file ending in {', '.join(FILES)}")
    if source.endswith(TABLES):
        return _table(source)
    if (text := text_of(source)) is not None:
        return ((f"{source}: line {number}", _chained(line)) for number, line in numbered_lines(text))
    text = _stdin() if source == STDIN else read_utf8(source)
    if text.lstrip().startswith("[") and not source.endswith((".jsonl", ".jsonl.gz")):
        return ((f"{source}: row {number}", row) for number, row in enumerate(json_value(text, source), 1))
    places = ((f"{source}: line {number}", line) for number, line in numbered_lines(text))
    return ((where, json_value(line, where)) for where, line in places)


def _chained(line: str) -> dict[str, str]:
    question, mark, answer = line.partition(CHAIN_MARK)
    return {"question": question, "answer": answer} if mark else {"text": line}


def _table(path: str) -> Iterator[tuple[str, Any]]:
    check_regular(path)
    datasets = _datasets(f"{path}: files ending in {' or '.join(TABLES)} need")
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs each error that it raises
    number = 0
    try:
        kind, options = "parquet", {}
        if path.endswith(".csv"):  # every value as it is written: no number, and no NA in place of words
            with open(path, encoding="utf-8-sig", newline="") as file:
                columns = next(csv.reader(file), [])
            features = datasets.Features({name: datasets.Value("string") for name in columns})
            kind, options = "csv", {"keep_default_na": False, "encoding": "utf-8-sig", "features": features}
        read = datasets.load_dataset(kind, data_files=[escape(path)], split="train", streaming=True, **options)
        for number, row in enumerate(read, 1):
            yield f"{path}: row {number}", _without_null(row)
    except Exception as error:  # errors of the libraries have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: it can't be read after row {number}: {reason}") from error


def _without_null(row: Any) -> Any:
    """Without the nulls that a table puts where a message has no such field."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(x) for name, x in value.items() if x is not None or name == "content"}
        return [clean(x) for x in value] if isinstance(value, list) else value

    return {name: clean(x) for name, x in row.items()}


def hub_rows(source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    """The first ``limit`` rows of a hub data set, ``name`` or ``name:subset``, with a warning if there are more.

    Raises:
        ValueError: it can't be loaded.
    """
    datasets = _datasets(f"{source!r} is not a file, and loading data from the hub needs")
    name, _, subset = source.partition(":")
    try:
        stream = datasets.load_dataset(name, subset or None, split=split, streaming=True)
        found = list(islice(stream, None if limit is None else limit + 1))
    except Exception as error:  # errors of the library, the network and file formats have no common base
        raise ValueError(f"{source!r} is not a file, and loading it from the hub failed: {reason_of(error)}") from error
    if limit is not None and len(found) > limit:
        _warn(f"{source}: only the first {limit:,} rows of the split {split!r} are read, and there are more")
    return found[:limit]


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{what} the datasets package: pip install datasets") from error
    return datasets


def _warn(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(sentence, stacklevel=3)
