"""Checks the types of a function's arguments by its annotations, for functions that may take some microseconds longer."""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from quietstar_kernels._checks import as_integer, as_number, shown

F = TypeVar("F", bound=Callable[..., Any])


def typed(function: F) -> F:
    """``function`` with a TypeError for an argument that is not what its annotation says. Numbers must be finite."""
    signature = inspect.signature(function)
    hints = get_type_hints(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.name not in arguments:
                continue
            value, name = arguments[parameter.name], parameter.name
            variable = parameter.kind is inspect.Parameter.VAR_KEYWORD
            for key, item in value.items() if variable else [(name, value)]:
                if not fits(item, hints[name]):
                    wanted = getattr(hints[name], "__name__", str(hints[name])).replace("torch.", "")
                    raise TypeError(f"{function.__name__}: {key} must be of type {wanted}, got {shown(item)}")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if hint is float:
        return math.isfinite(as_number(value))
    if hint is int:
        return as_integer(value) is not None
    if Callable in (origin, hint):
        return callable(value)
    if origin is Sequence:
        return isinstance(value, (list, tuple, range)) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, parts[0]) and fits(item, parts[1]) for key, item in value.items())
    return isinstance(value, origin or hint)
