"""A check for each kind of argument. An error is one sentence: the argument, what it must be, and what it is.

``QuietStar.think: seed must be an integer, got 1.5``

Each check returns the value, an integer or number as Python's own. The name that is passed may begin with the function's.
No tensor's values are read, except of one that stands for a number.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "choice",
    "flag",
    "function",
    "instance",
    "integer",
    "items",
    "mapping",
    "number",
    "file_path",
    "refusal",
    "seed_bits",
    "unicode",
    "tensor",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MOST = torch.finfo(torch.float64).max
MASKS = (*INTEGERS, torch.bool, torch.uint8)

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_PLAIN = (bool, int, float, str, bytes, list, tuple, dict, type(None))


def shown(value: Any) -> str:
    """A plain value itself, shortened; of a tensor its dtype and shape, of anything else its type."""
    if isinstance(value, Tensor):
        return f"a tensor of {_name(value.dtype)} {list(value.shape)}"
    if not isinstance(value, _PLAIN):
        return type(value).__name__
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return type(value).__name__


def refusal(name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {wanted}, got {shown(value)}")


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Any integer type, NumPy's and tensors [] too, but no bool."""
    found = as_integer(value)
    if found is None:
        raise refusal(name, "an integer", value)
    if (least is not None and found < least) or (most is not None and found > most):
        raise refusal(name, f"{least} or more" if most is None else f"{least:,} to {most:,}", found)
    return found


def seed_bits(name: str, value: Any) -> int:
    """64 bits, signed or not."""
    found = as_integer(value)
    if found is None or not -(2**63) <= found < 2**64:
        raise refusal(name, "an integer of 64 bits", value)
    return found


def as_integer(value: Any) -> int | None:
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.ndim > 0 or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # a RuntimeError comes from a tensor without data
        return None


def number(name: str, value: Any, wanted: str = "a finite number", least: float = -MOST, above: float = -math.inf) -> float:
    """A finite number of any real type, but no bool."""
    found = as_number(value)
    if found is None or not (above < found <= MOST and least <= found):
        raise refusal(name, wanted, value)
    return found


def as_number(value: Any) -> float | None:
    """An integer stays one, since messages and JSON show it as it was given."""
    found = as_integer(value)
    if found is not None:
        return found if abs(found) < 2**1023 else None
    if isinstance(value, Tensor):
        return float(value) if value.ndim == 0 and value.is_floating_point() and not value.is_meta else None
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise refusal(name, "True or False", value)
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise refusal(name, f"one of {', '.join(choices)}", value)
    return value


def unicode(name: str, value: Any) -> str:
    """Text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a str, got {type(value).__name__}")
    broken = next((i for i, letter in enumerate(value) if "\ud800" <= letter <= "\udfff"), None)
    if broken is not None:
        raise ValueError(f"{name} must be valid Unicode, character {broken} is half of a surrogate pair: {value[broken]!r}")
    return value


def file_path(name: str, value: Any) -> str:
    """A path that the file system can take."""
    if not isinstance(value, (str, os.PathLike)):
        raise refusal(name, "a path", value)
    found = unicode(name, os.fspath(value))
    if not found or "\0" in found:
        raise refusal(name, "a path", found)
    return found


def function(name: str, value: Any) -> Any:
    if not callable(value):
        raise refusal(name, "a function", value)
    return value


def instance(name: str, value: Any, cls: type[T]) -> T:
    if not isinstance(value, cls):
        raise refusal(name, f"{_article(cls)} {cls.__name__}", value)
    return value


def mapping(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise refusal(name, "a dict", value)
    return value


def items(name: str, value: Any, least: int = 0) -> Any:
    """A sequence that is neither text nor a tensor."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise refusal(name, "a sequence", value)
    if len(value) < least:
        raise ValueError(f"{name} must have at least {least} item{'s' * (least > 1)}, got {len(value)}")
    return value


def tensor(
    name: str,
    value: Any,
    letters: str,
    sizes: Mapping[str, int],
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> Tensor:
    """A dense tensor.

    Args:
        letters: its dimensions, such as "B,L"; "...,D" is any number of them and D.
        sizes: those that are known, by letter.
        device: of the model.
    """
    if not isinstance(value, Tensor):
        raise refusal(name, f"a tensor [{letters}]", value)
    if value.layout != torch.strided:
        raise refusal(name, f"a dense tensor [{letters}]", value)
    keys = [key for key in letters.split(",") if key not in ("", "...")]
    got, any_before = list(value.shape), "..." in letters
    own = got[max(0, len(got) - len(keys)) :] if any_before else got
    if len(own) != len(keys) or any(sizes.get(key, size) != size for key, size in zip(keys, own, strict=True)):
        known = ["..."] * any_before + [str(sizes.get(key, "?")) for key in keys]
        wanted = f"[{letters}]=[{', '.join(known)}]" if sizes else f"[{letters}]"
        raise ValueError(f"{name} must have shape {wanted}, got {got}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the model's embeddings, got {value.device}")
    if dtypes is not None and value.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(_name, dtypes))}, got {_name(value.dtype)}")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _article(cls: type) -> str:
    return "an" if cls.__name__[0] in "AEIOaeio" else "a"
