"""Checks of a config's fields: their types, from the annotations, and their ranges. ``owner`` begins each message."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from quietstar.arguments.values import as_integer, as_number, shown, unicode

__all__ = ["check", "check_at_least", "check_choice", "check_positive", "check_types"]

MOST = 2**63 - 1  # of an integer field
NAMES = {int: "an integer", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
MISSING = object()


def check_types(owner: str, config: Any, infinite: Sequence[str] = ()) -> None:
    """Raises ValueError unless each field has a value of its annotated type; numbers become Python's own.

    Integers may stand for numbers; bools are no integers; numbers are finite, but those of the fields in ``infinite``.
    """
    hints = _hints(config.__class__)
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), _kinds(hints[field.name])
        if field.name in infinite and value == math.inf:
            continue
        found = next((x for x in (_converted(value, kind) for kind in kinds) if x is not MISSING), MISSING)
        if found is MISSING:
            wanted = " or ".join(NAMES.get(kind, repr(kind)) for kind in kinds)
            raise ValueError(f"{owner}: {field.name} must be {wanted}, got {shown(value)}")
        if isinstance(found, str):
            unicode(f"{owner}: {field.name}", found)
        object.__setattr__(config, field.name, found)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _kinds(hint: Any) -> list[Any]:
    """The types, and the values of literals, that a value may have."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


def _converted(value: Any, kind: Any) -> Any:
    if kind is int:
        found = as_integer(value)
        return MISSING if found is None or abs(found) > MOST else found
    if kind is float:
        number = as_number(value)
        return MISSING if number is None or not math.isfinite(number) else number
    if isinstance(kind, type):
        return value if isinstance(value, kind) else MISSING
    return value if isinstance(value, str) and value == kind else MISSING


def check(owner: str, config: Any, name: str, ok: bool, wanted: str) -> None:
    """Raises ValueError unless ``ok``."""
    if not ok:
        raise ValueError(f"{owner}: {name} must be {wanted}, got {shown(getattr(config, name))}")


def check_choice(owner: str, config: Any, name: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless this field is one of ``choices``."""
    check(owner, config, name, getattr(config, name) in choices, f"one of {', '.join(choices)}")


def check_at_least(owner: str, config: Any, least: int, names: Iterable[str]) -> None:
    """Raises ValueError unless each of these fields is ``least`` or more."""
    for name in names:
        check(owner, config, name, getattr(config, name) >= least, f"{least} or more")


def check_positive(owner: str, config: Any, names: Iterable[str]) -> None:
    """Raises ValueError unless each of these fields is above 0."""
    for name in names:
        check(owner, config, name, getattr(config, name) > 0, "above 0")
