"""Signals that ask to stop: SIGTERM, Ctrl-C, SIGHUP of a terminal that is closed, SIGUSR1 of Slurm before a time limit.

Where nothing is under way that must be finished first, a command ends at once. Light to import: a command begins with it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

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
    """In this context ``answer`` gets the signals. SIGHUP stays ignored where nohup said so, and forked processes end."""
    before: dict[int, Any] = {}
    process = os.getpid()

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == process:
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
        yield
    finally:
        for caught, earlier in before.items():
            signal.signal(caught, earlier)


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
