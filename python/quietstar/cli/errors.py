"""How a command says what went wrong: exit codes, and errors and warnings of one line."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from quietstar.run.signals import CODE, name_of

USAGE, DATA, RUNTIME, SAVED, STOPPED, PIPE = 2, 3, 4, CODE, 130, 141

# What PyTorch's allocators say, and of a tensor that no memory could hold.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory: you tried|can't allocate memory: you tried|Cannot allocate memory"
    r"|Storage size calculation overflowed|numel: integer multiplication overflow"
)


class UsageError(Exception):
    """An option or a config file that can't be used."""


class Failure(Exception):
    """Ends the program with the exit code ``code``."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def runtime_failure(error: BaseException) -> str | None:
    """What a failure at run time says, in one line; None for an error that should not have come this far."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
        return (
            f"out of memory{f', {asked[1]} more were needed' if asked else ''}: quietstar doctor --model says what a step "
            "needs; smaller batches, texts or thoughts need less"
        )
    if isinstance(error, RuntimeError) and "without overflow" in str(error):
        return f"a number is too large for its dtype: {first_line(error)}"
    return first_line(error) if isinstance(error, (OSError, FloatingPointError)) else None


def stopped(came: Sequence[int], words: Sequence[str], resumes: bool = False) -> str:
    """What to say of a command, from what was typed, that a signal has ended outside a step; whether it ``resumes``."""
    again = ["quietstar", *words]
    if not resumes:
        return f"stopped by {name_of(came[0])}; nothing is left half written; start again with: {shlex.join(again)}"
    if not any(word.partition("=")[0] == "--resume" for word in words):
        again.append("--resume")
    return f"stopped by {name_of(came[0])}; what was saved before is whole; continue with: {shlex.join(again)}"


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print warnings without the place in the code that they are from; leave out what libraries say to each other's authors."""
    form = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(str(message))}\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        warnings.formatwarning = form


def one_line(text: str) -> str:
    """The text with escapes for line ends, control characters and what can't be encoded."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
