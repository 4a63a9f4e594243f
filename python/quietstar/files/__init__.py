"""Files: written whole, and read at one door."""

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    if name in ("replaced", "write_whole"):
        raise ImportError(f"quietstar.files.{name} is now quietstar.files.writing.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
