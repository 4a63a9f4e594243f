"""How a command fails: exit codes, and errors of one line."""

from __future__ import annotations

USAGE, DATA, RUNTIME, SAVED, STOPPED = 2, 3, 4, 75, 130


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
