"""One run at a time in a folder."""

from __future__ import annotations

import functools
import inspect
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from quietstar.files.reading import as_type, json_value
from quietstar.files.writing import FileLock, naming
from quietstar.run.processes import process_state

LOCK = ".quietstar.lock"
Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")

_held: set[tuple[int, Path]] = set()  # processes, since a fork has a copy of this, and folders that they have locked


class Owner(msgspec.Struct):
    """Who wrote a lock file."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def only_run_in(out: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing. A process may nest this for the same folder.

    Of a run of several processes, the main one holds the lock. It ends with that process, even if it is killed: the file that
    is left then names the dead owner, and the next run says that it removes it.
    """
    folder, state = Path(os.path.realpath(out)), process_state()
    held = os.getpid(), folder
    if held in _held:
        yield
        return
    made = not folder.exists()
    lock, refusal = _acquire(folder, out) if state.is_main_process else (None, "")
    if state.num_processes > 1:
        (refusal,) = broadcast_object_list([refusal])
    if refusal:
        raise ValueError(refusal)
    _held.add(held)
    try:
        yield
    finally:
        _held.discard(held)
        if lock is not None:
            lock.release(remove=True)
        if made:
            with suppress(OSError):  # it is not empty, unless the run failed at once
                folder.rmdir()


def alone_in_out(default: Any) -> Callable[[Callable[Inputs, Result]], Callable[Inputs, Result]]:
    """A decorator for a run's function: while it runs, no other run may write to the ``out`` of its argument ``config``."""

    def decorate(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
            config = signature.bind(*args, **kwargs).arguments.get("config")
            if not isinstance(config, default | None):
                return function(*args, **kwargs)  # which says what is wrong
            with only_run_in((config or default()).out):
                return function(*args, **kwargs)

        return run

    return decorate


def _acquire(folder: Path, out: str | os.PathLike) -> tuple[FileLock | None, str]:
    """The lock of a folder, or why it can't be had."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock.acquire(folder / LOCK)
    owner = _read_owner(folder / LOCK)
    if lock is None:
        return None, f"{out}: another run is writing there ({owner or 'it has just begun'}): take another out, or let it end"
    if not lock.certain:
        tqdm.write(f"{out}: its file system has no locks: make sure that no other run writes there")
    if owner:
        tqdm.write(f"{out}: removing the stale lock of {owner}")
    try:
        now = Owner(os.getpid(), socket.gethostname(), datetime.now().astimezone().isoformat(" ", "seconds"))
        with naming(folder / LOCK):
            os.ftruncate(lock.descriptor, 0)
            os.pwrite(lock.descriptor, json.dumps(msgspec.to_builtins(now)).encode(), 0)
    except OSError:
        lock.release(remove=True)
        raise
    return lock, ""


def _read_owner(path: Path) -> Owner | None:
    """Who wrote a lock file; None if it says nothing yet."""
    try:
        return as_type(Owner, json_value(path.read_bytes()[:4096], str(path)), str(path))
    except (OSError, ValueError):
        return None
