"""Signals that ask to stop: SIGTERM, Ctrl-C, SIGHUP of a terminal that is closed, SIGUSR1 of Slurm before a time limit.

Where nothing is under way that must be finished first, a command ends at once. Light to import: a command begins with it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

PATIENCE = 3.0  # seconds; launchers may send a signal twice at once
STUCK = "{name}: waiting for a call to end, perhaps for another process; another signal ends this one, without saving"
CODE = 75  # of a command that was stopped; Slurm's example queues a job again for it
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
came: list[int] = []  # the signals of the command that runs, those apart that a loop of steps answered


class Stopped(KeyboardInterrupt):
    """A signal ends the command."""


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def say(text: str) -> None:
    """Write a line past ``sys.stderr``, which a signal may have found in the middle of a write and can't be entered twice."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())  # below a bar, which then begins a new line


@contextmanager
def answered(answer: Callable[[int], None]) -> Iterator[None]:
    """In this context ``answer`` gets the signals. SIGHUP stays ignored where nohup said so, and forked processes end.

    Python answers between two of its instructions, so not while a call waits for another process. If it hasn't answered after
    some seconds, the next signal ends the process at once, with exit code 75.
    """
    before: dict[int, Any] = {}
    process, seen = os.getpid(), _Seen()

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == process:
            seen.answered = time.monotonic()
            answer(number)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    try:
        for number in NUMBERS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            with suppress(ValueError):  # only the main thread may handle signals
                before[number] = signal.signal(number, handler)
        with seen.by_a_thread() if before else nullcontext():
            yield
    finally:
        for caught, earlier in before.items():
            signal.signal(caught, earlier)


class _Seen:
    """Signals as a thread sees them, which is told by the system at once, whatever the main thread does."""

    answered = 0.0  # when the main thread last did

    @contextmanager
    def by_a_thread(self) -> Iterator[None]:
        end, start = os.pipe()
        os.set_blocking(start, False)
        earlier = signal.set_wakeup_fd(start, warn_on_full_buffer=False)
        _wakeups.append(start)
        thread = threading.Thread(target=self._watch, args=(end,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(earlier)
            _wakeups.remove(start)
            os.close(start)
            thread.join()
            os.close(end)

    def _watch(self, end: int) -> None:
        first, said, name = 0.0, True, ""  # of signals that came since the main thread last answered
        ready = select.poll()
        ready.register(end, select.POLLIN)
        while True:
            found = ready.poll(None if said else 1000 * PATIENCE)
            now, waits = time.monotonic(), first > self.answered + 1  # it may have answered before this thread saw it
            if not found:
                said = True
                if waits:
                    say(STUCK.format(name=name))
                continue
            came = os.read(end, 1)
            if not came:
                return
            if came[0] in NUMBERS:
                name = name_of(came[0])
                if first and waits and now - first >= PATIENCE:
                    say(f"quietstar: stopped by {name} in the middle of a call")
                    os._exit(CODE)
                if not waits:
                    first, said = now, False


_wakeups: list[int] = []  # of this process; signals of a forked one are none of its own
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) if _wakeups else None)


@contextmanager
def ending_at_once() -> Iterator[list[int]]:
    """In this context the first signal raises Stopped, and a second one ends the process. Gives the signals that came."""
    came.clear()

    def leave() -> None:
        say(f"quietstar: stopped by {name_of(came[-1])}")
        os._exit(CODE)

    def answer(number: int) -> None:
        came.append(number)
        if len(came) > 1:
            leave()
        raise Stopped

    def not_raised(unraisable: Any) -> None:  # it came in a destructor or a callback, where exceptions are lost
        if unraisable.exc_type is Stopped:
            leave()
        hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, not_raised
    try:
        with answered(answer):
            yield came
    finally:
        sys.unraisablehook = hook
