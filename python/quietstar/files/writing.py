"""Files and folders that are written whole or not at all, and locks that end with their process, whatever ends it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without them, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_open: set[int] = set()  # descriptors of the locks that this process holds


class FileLock:
    """An exclusive lock on a file, which is made if it is missing. It is held until ``release`` or the end of the process.

    Attributes:
        certain: False where the system or the file system has no locks, so that others may hold it too.
    """

    def __init__(self, descriptor: int, path: Path, certain: bool):
        self.descriptor, self.path, self.certain = descriptor, path, certain

    @classmethod
    def acquire(cls, path: str | os.PathLike) -> FileLock | None:
        """The lock; None if another process holds it."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                certain = _lock(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _same_file(descriptor, path):
                _open.add(descriptor)
                return cls(descriptor, Path(path), certain)
            os.close(descriptor)  # its holder removed the file between the two: lock the one that is there now

    def release(self, remove: bool) -> None:
        """Give the lock back, and to ``remove`` the file do so while no other process can have locked it."""
        if remove and _same_file(self.descriptor, self.path):
            os.unlink(self.path)
        _open.discard(self.descriptor)
        os.close(self.descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file. Returns False if it can't be locked here, raises BlockingIOError if another process has."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        return False
    return True


def _same_file(descriptor: int, path: str | os.PathLike) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    """A forked process that outlives this one must not keep its locks."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


# The weights of a checkpoint and what belongs to them: the old ones are not kept beside the new.
_OF_WEIGHTS = re.compile(
    r"(model(-[0-9]+-of-[0-9]+)?|adapter_model|quietstar)\.safetensors"
    r"|model\.safetensors\.index\.json|adapter_config\.json|quietstar\.json"
)


# How the names of temporary folders end, with the id of their process: one that is being written, and one that it replaces.
NEW = r"([0-9]+)-[a-z0-9_]{8}"
OLD = rf"{NEW}-old"


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Lets errors of the disk name ``path``: those of writing don't, and libraries in Rust have their own kinds of them."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(path)) from error


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file and rename it into place, so that no partial file is ever left; text as UTF-8."""
    with beside(path) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def beside(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name next to ``path`` to write a file to. It is renamed to ``path`` at the end; an error deletes it.

    What processes that were killed here have left is removed. A ``path`` that is a link stays one.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.is_dir() or not path.parent.is_dir():
        number = errno.EISDIR if path.is_dir() else errno.ENOENT
        raise OSError(number, os.strerror(number), os.fspath(given))
    _remove_leftovers(path)
    file = path.with_name(f".{path.name}-{os.getpid()}")
    while (lock := FileLock.acquire(file)) is None:
        pass  # another process is removing what one with this id has left
    mode = os.fstat(lock.descriptor).st_mode & 0o777
    try:
        with naming(given):
            yield file
            file.chmod(mode)  # a library may have put another file there
        os.replace(file, path)
    finally:
        file.unlink(missing_ok=True)
        lock.release(remove=False)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that have ended, which no longer lock them."""
    ours = re.compile(re.escape(f".{path.name}-") + "[0-9]+")
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        if ours.fullmatch(file.name) and file.is_file() and (lock := FileLock.acquire(file)):
            lock.release(remove=lock.certain)


@contextmanager
def replaced(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that takes the place of ``directory`` at the end; an error leaves the old one whole.

    Other files of the old folder are kept, except the weights of a checkpoint and what belongs to them. A ``directory`` that is
    a link stays one. What processes that were killed here have left is removed, or put back.
    """
    given, directory = directory, Path(os.path.realpath(directory))
    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(given))
    directory.parent.mkdir(parents=True, exist_ok=True)
    put_back(directory)
    for old in _left_by_dead(directory, OLD):
        _keep_others(old, directory)
        shutil.rmtree(old)
    for unfinished in _left_by_dead(directory, NEW):
        shutil.rmtree(unfinished)
    new = directory.with_name(f".{directory.name}-{os.getpid()}-{secrets.token_hex(4)}")
    new.mkdir()
    try:
        with naming(given):
            yield new
            follow_umask(new)
            if directory.is_dir():
                shutil.copymode(directory, new)
        _put_in_place(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        put_back(directory)


def follow_umask(folder: Path) -> None:
    """Let who may enter a new folder read its files: safetensors makes them only for their owner."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.parent.stat().st_mode & 0o666)


def put_back(directory: str | os.PathLike) -> None:
    """Give a folder its name back if a process was killed between moving it away and putting the new one in its place.

    Where the system can exchange two folders in one step, there is no such moment.
    """
    directory = Path(os.path.realpath(directory))
    for old in _left_by_dead(directory, OLD):
        if not directory.exists():
            os.replace(old, directory)


def _left_by_dead(directory: Path, form: str) -> list[Path]:
    """The temporary folders for ``directory`` that no other process is writing."""
    ours = re.compile(re.escape(f".{directory.name}-") + form)
    found = [(path, ours.fullmatch(path.name)) for path in (directory.parent.iterdir() if directory.parent.is_dir() else ())]
    return [path for path, match in found if match and path.is_dir() and not _is_another_process(int(match[1]))]


def _is_another_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # in a container, a command has the same id each time


def _put_in_place(new: Path, directory: Path) -> None:
    if not directory.exists():
        os.replace(new, directory)
        return
    _keep_others(directory, new)
    old = new
    if not _exchange(new, directory):
        old = new.with_name(new.name + "-old")
        os.replace(directory, old)
        os.replace(new, directory)
    _keep_others(old, directory)  # what came in the meantime
    shutil.rmtree(old)


def _keep_others(old: Path, new: Path) -> None:
    """Link the files of ``old`` that ``new`` lacks into it, so that they are in either at any moment."""
    for file in old.iterdir():
        if file.is_dir() or not _OF_WEIGHTS.fullmatch(file.name):
            _keep(file, new / file.name)


def _keep(file: Path, target: Path) -> None:
    """Link a file, or all of a folder, which may hold another checkpoint."""
    if file.is_dir() and not file.is_symlink():
        if target.is_dir() or not os.path.lexists(target):
            target.mkdir(exist_ok=True)
            for inner in file.iterdir():
                _keep(inner, target / inner.name)
            shutil.copystat(file, target)  # some remove the oldest of the folders
    elif not os.path.lexists(target):
        try:
            os.link(file, target, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(file, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's place in one step. Returns False where the system can't."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    return rename is not None and rename(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
