"""Checks arguments. All errors have the same form:

``thought_attention: k must have shape [B,G,M,K]=[2,4,640,64], got [2,4,512,64]``
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

INFINITE_WINDOW = 2**30  # no position id is as large
LARGEST_INTEGER = 2**63 - 1
IGNORED = -100  # a target that gets no log-probability
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shown(value: Any) -> str:
    """A plain value as Python writes it, shortened; the type of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {dtype_names([value.dtype])}"
    return _short.repr(value) if isinstance(value, (bool, int, float, str, bytes, list, tuple)) else type(value).__name__


def as_integer(value: Any) -> int | None:
    """Integers of any type but bool and Tensor, whose value would have to be read from the device."""
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float:
    """NaN for what is no number, or one that fp64 can't hold."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def check_instance(op: str, name: str, value: Any, of: type) -> None:
    if not isinstance(value, of):
        raise TypeError(f"{op}: {name} must be a {of.__name__}, got {shown(value)}")


class Checker:
    """Checks the arguments of one op, and that dimensions with the same letter have the same size.

    The first tensor with a letter sets its size.
    """

    def __init__(self, op: str, **sizes: int):
        self.op = op
        self.sizes = sizes

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.op}: {message}")

    def tensor(
        self,
        name: str,
        value: Any,
        letters: str,
        dtype: Sequence[torch.dtype] | None = None,
        device: torch.device | None = None,
        like: str = "",
    ) -> None:
        """``letters`` are the dimensions, comma-separated, such as ``"B,G,M,K"``. Raises ValueError.

        ``like``, for the error: the argument that sets dtype and device.
        """
        if not isinstance(value, Tensor):
            raise self.fail(f"{name} must be a tensor [{letters}], got {shown(value)}")
        keys, sizes, got = letters.split(",") if letters else [], self.sizes, value.shape
        before = len(sizes)
        if len(got) != len(keys) or tuple(map(sizes.setdefault, keys, got)) != got:
            while len(sizes) > before:
                sizes.popitem()
            known = ",".join(str(sizes.get(key, "?")) for key in keys)
            raise self.fail(f"{name} must have shape [{letters}]=[{known}], got {str(list(got)).replace(', ', ',')}")
        if dtype is not None and value.dtype not in dtype:
            same = f" like {like}" if like and len(dtype) == 1 and dtype[0] in FLOATS else ""
            raise self.fail(f"{name} must have dtype {dtype_names(dtype)}{same}, got {dtype_names([value.dtype])}")
        if device is not None and value.device != device:
            raise self.fail(f"{name} must be on {device}{like and f' like {like}'}, got {value.device}")
        if value.layout is not torch.strided:
            raise self.fail(f"{name} must be a dense tensor, got one of layout {str(value.layout).removeprefix('torch.')}")

    def leading(self, name: str, value: Any, letters: str) -> None:
        """Checks the first dimensions of a tensor of any dtype, whose sizes are known; any others may follow."""
        known = tuple(self.sizes[key] for key in letters.split(","))
        if not isinstance(value, Tensor) or value.shape[: len(known)] != known or value.layout is not torch.strided:
            sizes = ",".join(map(str, known))
            raise self.fail(f"{name} must be a dense tensor of shape [{letters},...]=[{sizes},...], got {shown(value)}")

    def has_values(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            if value.is_meta:
                raise self.fail(f"{name} must have values, got a tensor on meta")

    def last_strides_one(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            if value.stride(-1) != 1 and value.shape[-1] > 1 and value.numel():
                raise self.fail(f"{name} must have a last stride of 1, got strides {list(value.stride())}")

    def width(self, letter: str, name: str) -> None:
        if not 1 <= self.sizes[letter] <= 256:
            raise self.fail(f"head width {letter} must be from 1 to 256, got {self.sizes[letter]} in {name}")

    def head_groups(self, keys: str) -> None:
        if self.sizes["G"] == 0 or self.sizes["H"] % self.sizes["G"]:
            got = f"H={self.sizes['H']} in q, G={self.sizes['G']} in {keys}"
            raise self.fail(f"H must be a multiple of G, got {got}")

    def positive(self, name: str, value: Any, zero: bool = False) -> float:
        """A finite number above zero; with ``zero``, zero too."""
        found = value if type(value) is float else as_number(value)
        if not (0 < found < math.inf or (zero and found == 0)):
            raise self.fail(f"{name} must be {'zero or ' if zero else ''}a positive finite number, got {shown(value)}")
        return found

    def positive_or_none(self, name: str, value: Any) -> float | None:
        return None if value is None else self.positive(name, value)

    def finite_or_none(self, name: str, value: Any) -> float | None:
        if value is not None and not math.isfinite(as_number(value)):
            raise self.fail(f"{name} must be finite, got {shown(value)}")
        return None if value is None else float(value)

    def integer(self, name: str, value: Any, least: int = -(2**63), most: int = LARGEST_INTEGER, what: str = "") -> int:
        """``what``: the range in words, if these are not "from least to most"."""
        found = value if type(value) is int else as_integer(value)
        if found is None or not least <= found <= most:
            what = what or (f"an integer of at least {least:,}" if most == LARGEST_INTEGER else f"from {least:,} to {most:,}")
            raise self.fail(f"{name} must be {what}, got {shown(value)}")
        return found

    def window(self, value: Any) -> int | None:
        """One that cuts nothing becomes a number that fits 32 bits."""
        if value is None:
            return None
        found = value if type(value) is int else as_integer(value)
        if found is None or found < 1:
            raise self.fail(f"window must be None or an integer of at least 1, got {shown(value)}")
        return min(found, INFINITE_WINDOW)

    def flag(self, name: str, value: Any) -> bool:
        if value is not True and value is not False:
            raise self.fail(f"{name} must be True or False, got {shown(value)}")
        return value

    def choice(self, name: str, value: Any, choices: Sequence[str]) -> str:
        if not isinstance(value, str) or value not in choices:
            raise self.fail(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
        return value

    def device(self, value: Any) -> torch.device:
        """The argument ``device``: a torch.device or the name of one."""
        try:
            if isinstance(value, (str, torch.device)):
                return torch.device(value)
        except RuntimeError:
            pass
        raise self.fail(f"device must be a device such as cpu, cuda or cuda:1, got {shown(value)}")


def check_head(
    check: Checker,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    banned: Iterable[int],
) -> tuple[float | None, float | None, list[int]]:
    """Checks the arguments that the vocabulary ops share. Returns scale, softcap, and ``banned`` sorted, without duplicates."""
    check.tensor("hidden", hidden, "R,D", FLOATS)
    check.tensor("weight", weight, "V,D", (hidden.dtype,), hidden.device, "hidden")
    if bias is not None:
        check.tensor("bias", bias, "V", (hidden.dtype,), hidden.device, "hidden")
    softcap = check.positive_or_none("softcap", softcap)
    scale = check.finite_or_none("scale", scale)
    if check["V"] == 0:
        raise check.fail("weight must have at least one row, V=0")
    if type(banned) is tuple and not banned:
        return scale, softcap, []
    try:
        ids = sorted({operator.index(token) for token in banned})
    except TypeError:
        raise check.fail(f"banned must be a sequence of ids, got {shown(banned)}") from None
    if ids and not (0 <= ids[0] and ids[-1] < check["V"]):
        raise check.fail(f"banned ids must be from 0 to V-1={check['V'] - 1}, got {shown(ids)}")
    if len(ids) == check["V"]:
        raise check.fail(f"banned must leave at least one of the V={check['V']} ids")
    return scale, softcap, ids


def check_attention(check: Checker, keys: str, values: str, sinks: Tensor | None, device: torch.device) -> None:
    """Checks what the attention ops share, after their tensors; ``keys`` and ``values`` name two of these."""
    check.head_groups(keys)
    check.width("K", "q")
    check.width("E", values)
    if sinks is not None:
        check.tensor("sinks", sinks, "H", FLOATS, device, "layout")


def check_targets(check: Checker, targets: Tensor, banned: list[int]) -> None:
    """Checks their values, if reading these doesn't wait for a GPU."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(targets):  # in vmap: check the targets of all calls at once
        targets = torch._C._functorch.get_unwrapped(targets)
    kept = targets[targets != IGNORED]
    outside = kept[(kept < 0) | (kept >= check["V"])]
    if outside.numel():
        raise check.fail(f"targets must be from 0 to V-1={check['V'] - 1} or -100, got {int(outside[0])}")
    for token in banned:
        if bool((kept == token).any()):
            raise check.fail(f"targets must not hold a banned id, got {token}")
