"""Files as they were saved: sizes and SHA-256, and names that stay inside their folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping

from quietstar.files.reading import check_regular

__all__ = ["check_names", "check_saved", "sha256"]


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
    """Check files against what was saved: all are there and regular, then their sizes, and only then their hashes.

    Args:
        find: a file's path by its name; None if it is missing.
        hashes: SHA-256 in hex, of some or all of the files.

    Raises:
        ValueError: naming the first file that is missing or not as it was saved.
    """
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
