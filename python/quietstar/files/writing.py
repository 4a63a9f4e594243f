"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["beside", "put_back", "replaced", "write_whole"]

# A checkpoint's weights and their index: those of the folder that is replaced never go with the new ones.
WEIGHTS = re.compile(r"((adapter_)?model(-\d+-of-\d+)?|quietstar)\.safetensors(\.index\.json)?")
# How temporary folders end: the one that is being written, and the one that it replaces.
NEW = r"-\w{8}"
OLD = rf"{NEW}-old"


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file and rename it into place, so that no partial file is ever left; text as UTF-8."""
    with beside(path) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def beside(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name next to ``path`` to write a file to. It is renamed to ``path`` at the end; an error deletes it.

    What a killed process left is deleted by the next call.
    """
    path = Path(path)
    for unfinished in _left_by_dead(path):
        unfinished.unlink()
    file = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield file
        os.replace(file, path)
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def replaced(directory: str | os.PathLike, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder that takes the place of ``directory`` at the end. An error leaves the old one whole.

    Other files of the old folder are moved to the new one, except weights, their index and files named in ``stale``. A process
    that is killed may leave the old folder, or some of its files, in a hidden one beside it; the next call, or ``put_back``,
    brings them back.
    """
    directory, stale = Path(directory), set(stale)
    directory.parent.mkdir(parents=True, exist_ok=True)
    put_back(directory)
    for old in _left_by_dead(directory, OLD):
        _keep_others(old, directory, stale)
    for unfinished in _left_by_dead(directory, NEW):
        shutil.rmtree(unfinished)
    new = Path(tempfile.mkdtemp(prefix=f".{directory.name}-{os.getpid()}-", dir=directory.parent))
    try:
        new.chmod(0o755)
        yield new
        if directory.exists():
            old = new.with_name(new.name + "-old")
            os.replace(directory, old)
            os.replace(new, directory)
            _keep_others(old, directory, stale)
        else:
            os.replace(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        put_back(directory)


def put_back(directory: str | os.PathLike) -> None:
    """Rename a folder back that a process was replacing by a new one when it was killed."""
    directory = Path(directory)
    for old in _left_by_dead(directory, OLD):
        if not directory.exists():
            os.replace(old, directory)


def _left_by_dead(path: Path, ending: str = "") -> list[Path]:
    """The temporary files or folders for ``path`` that no process is writing."""
    form = re.compile(rf"\.{re.escape(path.name)}-(\d+){ending}")
    found = [(other, form.fullmatch(other.name)) for other in path.parent.glob(f".{glob.escape(path.name)}-*")]
    return [other for other, match in found if match and not _is_another_process(int(match[1]))]


def _is_another_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # a container's processes have the same ids each time


def _keep_others(old: Path, directory: Path, stale: set[str]) -> None:
    for file in old.iterdir():
        if not (directory / file.name).exists() and not WEIGHTS.fullmatch(file.name) and file.name not in stale:
            os.replace(file, directory / file.name)
    shutil.rmtree(old)
