"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced", "write_whole"]

# A checkpoint's weights and their index: those of the folder that is replaced never go with the new ones.
WEIGHTS = (".safetensors", ".safetensors.index.json")


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file and rename it into place, so that no partial file is ever left; text as UTF-8."""
    with beside(path) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def beside(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name next to ``path`` to write a file to. It is renamed to ``path`` at the end; an error deletes it."""
    path = Path(path)
    file = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield file
        os.replace(file, path)
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def replaced(directory: str | os.PathLike, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder that takes the place of ``directory`` at the end; a crash leaves either the old or the new one whole.

    Other files of the old folder are moved to the new one, except weights, their index and files named in ``stale``.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        new.chmod(0o755)
        yield new
        _put_in_place(new, directory, set(stale))
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _put_in_place(new: Path, directory: Path, stale: set[str]) -> None:
    if not directory.exists():
        os.replace(new, directory)
        return
    old = new.with_name(new.name + "-old")
    os.replace(directory, old)
    os.replace(new, directory)
    for file in old.iterdir():
        if not (directory / file.name).exists() and not file.name.endswith(WEIGHTS) and file.name not in stale:
            os.replace(file, directory / file.name)
    shutil.rmtree(old)
