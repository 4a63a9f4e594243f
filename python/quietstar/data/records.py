"""Files of records that may be larger than memory, read one record at a time in any order: .jsonl and .parquet."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from quietstar.files.reading import as_type, check_regular, json_value
from quietstar.files.writing import beside

Record = dict[str, Any]
Write = Callable[[Sequence[Record]], None]
SUFFIXES = (".jsonl", ".parquet")


class Records(Protocol):
    """Records by number, counted from 1.

    Attributes:
        path: the file.
        unit: what the numbers count: lines or rows.
    """

    path: Path
    unit: str

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Number and value of each record, in order. Raises ValueError, naming the record, if it is damaged or no ``kind``."""
        ...

    def read(self, number: int) -> Any: ...


class JsonLines:
    """One record per line, except blank lines. Memory holds one number per line."""

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


def open_records(path: str | os.PathLike, kind: Any = Any) -> Records:
    """The records of a file.

    Args:
        kind: the type of a record, as in ``quietstar.files.reading``.

    Raises:
        ValueError: the file has another ending, is missing, damaged or no regular file, or is parquet and pyarrow is not
            installed.
    """
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

    Raises:
        ValueError: the file has another ending, or is parquet and pyarrow is not installed.
    """
    path = _checked(path)
    if path.suffix == ".parquet":
        _parquet(path)
    with beside(path) as file, _writer(path.suffix, file, columns) as write:
        yield write


@contextmanager
def _writer(suffix: str, file: Path, columns: dict[str, tuple[str, int]]) -> Iterator[Write]:
    if suffix == ".jsonl":
        with open(file, "w", encoding="utf-8") as lines:
            yield lambda records: lines.writelines(json.dumps(record) + "\n" for record in records)
        return
    parquet = _parquet(file)
    import pyarrow

    def kind(value: str, lists: int) -> Any:
        return pyarrow.list_(kind(value, lists - 1)) if lists else getattr(pyarrow, value)()

    schema = pyarrow.schema([(name, kind(*column)) for name, column in columns.items()])
    with parquet.ParquetWriter(file, schema) as rows:
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
