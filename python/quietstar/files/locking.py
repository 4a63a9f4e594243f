"""Locks that end with their process, whatever ends it: the operating system holds them, not a file's existence."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without them, where nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["FileLock"]

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
        """Give the lock back.

        Args:
            remove: also remove the file, while no other process can have locked it.
        """
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
