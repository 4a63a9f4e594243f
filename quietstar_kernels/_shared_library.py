"""What the compiled back ends have in common: a library that may be missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def why_missing(file: Path, absent: str, load: Callable[[], object]) -> str | None:
    """None if ``file`` exists and loads; else the reason, in words: ``absent``, or what the loader says."""
    if not file.exists():
        return absent
    try:
        load()
    except OSError as error:
        return f"its library does not load: {error}"
    return None
