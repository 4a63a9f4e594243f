"""Range checks of config fields: one sentence with the field's name, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check(owner: str, config: Any, name: str, ok: bool, wanted: str) -> None:
    """Raises ValueError unless ``ok``. ``owner`` is the name that the message begins with."""
    if not ok:
        raise ValueError(f"{owner}: {name} must be {wanted}, got {getattr(config, name)!r}")


def check_at_least(owner: str, config: Any, least: int, names: Iterable[str]) -> None:
    """Raises ValueError unless each of these fields is ``least`` or more."""
    for name in names:
        check(owner, config, name, getattr(config, name) >= least, f"{least} or more")


def check_positive(owner: str, config: Any, names: Iterable[str]) -> None:
    """Raises ValueError unless each of these fields is above 0."""
    for name in names:
        check(owner, config, name, getattr(config, name) > 0, "above 0")
