"""Reading files: regular ones only, JSON and YAML checked against a type, each error one sentence.

A type is anything that ``msgspec.convert`` takes: a ``msgspec.Struct``, a dataclass, ``dict[str, int]``, ``Any``. The formats
accept what ``json.dumps`` writes: NaN and Infinity too.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

LARGEST = 64 * 2**20  # bytes of a settings file; none of ours is larger
LARGEST_YAML = 2**20  # it takes 40 times as long to read


def reason_of(error: BaseException) -> str:
    """The first line of what an error says; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_regular(path: str | os.PathLike) -> int:
    """The size of a file in bytes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL, or a character that the file system can't encode
        raise ValueError(f"{os.fspath(path)!r} is no file name: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file")
    return status.st_size


def read_utf8(path: str | os.PathLike) -> str:
    """The text of a regular file, packed if it ends in .gz, without its byte order mark.

    Raises ValueError, naming the file, if it can't be read or decoded.
    """
    check_regular(path)
    try:
        content = Path(path).read_bytes()
        return decoded(gzip.decompress(content) if os.fspath(path).endswith(".gz") else content, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def decoded(content: bytes, where: str) -> str:
    """The text in UTF-8 bytes. Raises ValueError, which begins with ``where``, for others."""
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{where}: byte {error.start}, in line {line}, is not UTF-8") from error


def read_json(path: str | os.PathLike, kind: Any = Any) -> Any:
    """The value of a JSON file of at most 64 MiB. Raises ValueError, naming the file, if it can't be read or is no ``kind``."""
    _check_size(path)
    return as_type(kind, json_value(read_utf8(path), str(path)), str(path))


def read_yaml(path: str | os.PathLike, kind: Any = Any) -> Any:
    """The value of a YAML or JSON file of at most 1 MiB, as ``read_json``.

    Aliases are refused: a few lines of them can stand for gigabytes. So are tags, which name types.
    """
    _check_size(path, LARGEST_YAML)
    text = read_utf8(path)
    try:
        value = yaml.load(text, _Plain)
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if "\\" in text:
        _check_unicode(value, str(path))
    return as_type(kind, value, str(path))


def json_lines(path: str | os.PathLike, kind: Any = Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank. Raises ValueError, naming the line, where it is not JSON of the type."""
    for number, line in numbered_lines(read_utf8(path)):
        where = f"{path}: line {number}"
        yield number, as_type(kind, json_value(line, where), where)


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank. ``str.splitlines`` would also end lines at form feeds and the like."""
    return ((number, line) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip())


def json_value(text: str | bytes, where: str) -> Any:
    """The value of a JSON text. Raises ValueError, which begins with ``where``, if it is not JSON or can't be UTF-8."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if r"\ud" in text.lower():
        _check_unicode(value, where)
    return value


def as_type(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as ``kind``. Raises ValueError, which begins with ``where`` and names the place, if it is something else."""
    if kind is Any:
        return value
    import msgspec  # here: a model runs where it is not installed, as long as no file is read

    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {str(error).replace('`', '')}") from error


def _check_size(path: str | os.PathLike, most: int = LARGEST) -> None:
    size = check_regular(path)
    if size > most:
        raise ValueError(f"{path}: {size:,} bytes are too many for a file of settings, {most:,} are the most")


def _check_unicode(value: Any, where: str) -> None:
    """Raises ValueError if a text in ``value`` has half of a surrogate pair: no tokenizer takes that, and no file."""
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not whole Unicode: half of a pair, {error.object[error.start]!a}") from error


class _Plain(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        for kind, has in (("an alias", self.check_event(yaml.AliasEvent)), ("a tag", getattr(event, "tag", None))):
            if has:
                raise yaml.YAMLError(f"line {event.start_mark.line + 1} has {kind}, which is not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} has {key.value} a second time")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        text = node.value.lstrip("+-")
        if text.isdigit() and text.startswith("0") and text.strip("0"):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} has {node.value}, in base 8: write it without the first 0")
        return node.value if ":" in text else super().construct_yaml_int(node)  # 1:30 is 90 in base 60


_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hex; about 0.6 s for a gigabyte, with SHA instructions."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_names(where: str, names: Iterable[str]) -> None:
    """Raises ValueError, which begins with ``where``, for a name that is not that of a file in the folder itself."""
    for name in names:
        if name in ("", ".", "..") or any(letter in name for letter in "/\\\0"):
            raise ValueError(f"{where} must name files of its own folder, got {name!r}")


def check_saved(
    where: str | os.PathLike, find: Callable[[str], str | None], sizes: Mapping[str, int], hashes: Mapping[str, str]
) -> None:
    """Check files against what was saved: all are there and regular, then their sizes, and only then their hashes."""
    paths: dict[str, str] = {}
    for name in {**sizes, **hashes}:
        path = find(name)
        if path is None:
            raise ValueError(f"{where}: {name} is missing")
        paths[name], size = path, check_regular(path)
        if size != sizes.get(name, size):
            raise ValueError(f"{where}: {name} is damaged: it has {size:,} bytes, {sizes[name]:,} were saved")
    for name, digest in hashes.items():
        if sha256(paths[name]) != digest:
            raise ValueError(f"{where}: {name} is damaged: it is not the file that was saved")
