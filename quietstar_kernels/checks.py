"""Checks of arguments, for both packages. An error is one sentence: the argument, what it must be, and what it is.

``thought_attention: k must have shape [B,G,M,K]=[2,4,640,64], got [2,4,512,64]``

Functions such as ``integer`` check one value and return it, integers and numbers as Python's own types; its name may begin with
the caller's. ``check_types`` and the functions after it check fields of a config. ``Checker`` checks the arguments of an op.

Values of tensors are read only on a CPU, where nothing waits for them.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

INFINITE_WINDOW = 2**30  # no position id is as large
LARGEST_INTEGER = 2**63 - 1
LARGEST_NUMBER = torch.finfo(torch.float64).max
LARGEST_FP32 = torch.finfo(torch.float32).max
IGNORED = -100  # a target that gets no log-probability
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MASKS = (*INTEGERS, torch.bool, torch.uint8)
HOST = "cpu"
ASSERTING = ("cpu", "cuda")  # devices that can check by themselves

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_PLAIN = (bool, int, float, str, bytes, list, tuple, dict, type(None))


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shown(value: Any) -> str:
    """A plain value itself, shortened; of a tensor its shape and dtype, of anything else its type."""
    if isinstance(value, Tensor):
        grad = " to which no gradient would flow: detach it, or multiply the inputs by it" if _loses_grad(value) else ""
        return f"a tensor {list(value.shape)} of {dtype_names([value.dtype])}{grad}"
    if not isinstance(value, _PLAIN):
        return type(value).__name__
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return type(value).__name__


def refusal(name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {wanted}, got {shown(value)}")


def on_host(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == HOST and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """False on meta, for fake tensors and inside ``make_fx``, where no value can be looked at."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def refuse_where(wrong: Tensor, message: str, detail: Callable[[], str] = str) -> None:
    """Raises ValueError if a bool tensor holds True; ``detail`` ends the message with what only values can tell.

    A GPU asserts it by itself, so that nothing waits, and so does a compiled function.
    """
    if on_host(wrong) and not torch.compiler.is_compiling():
        if bool(wrong.any()):
            raise ValueError(message + detail())
    elif wrong.device.type in ASSERTING:
        torch._assert_async(~wrong.any(), message)


def refuse_outside(name: str, values: Tensor, most: int, letter: str) -> None:
    """Raises as ``refuse_where`` for integers that are not from 0 to ``most``, which the message calls ``letter``."""
    outside = (values < 0) | (values > most)
    refuse_where(outside, f"{name} must be from 0 to {letter}={most}", lambda: f", got {int(values[outside][0])}")


def _loses_grad(value: Tensor) -> bool:
    """Whether autograd, forwards or backwards, follows a number that would be read as a constant."""
    if value.ndim:
        return False
    forwards = forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None
    return forwards or (torch.is_grad_enabled() and value.requires_grad)


def as_integer(value: Any) -> int | None:
    """Integers of any type, NumPy's and tensors [] on the CPU too, but no bool."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Tensor) and (value.ndim > 0 or value.dtype == torch.bool or not on_host(value)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float | None:
    """Integers stay integers, so that messages and JSON show them as they were given. A tensor has no gradient to lose."""
    found = as_integer(value)
    if found is not None:
        return found if abs(found) < 2**1023 else None
    if isinstance(value, Tensor):
        read = value.ndim == 0 and value.is_floating_point() and on_host(value) and not _loses_grad(value)
        return float(value) if read else None
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    except OverflowError:  # a fraction
        return None


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
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


def number(
    name: str, value: Any, wanted: str = "a finite number", least: float = -LARGEST_NUMBER, above: float = -math.inf
) -> float:
    """A finite number of any real type, but no bool."""
    found = as_number(value)
    if found is None or not (above < found <= LARGEST_NUMBER and least <= found):
        raise refusal(name, wanted, value)
    return found


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
        raise refusal(name, f"{'an' if cls.__name__[0] in 'AEIOaeio' else 'a'} {cls.__name__}", value)
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
    """A dense tensor, whose ``letters`` are as in ``Checker.tensor``.

    Args:
        sizes: those that are known, by letter.
        device: of the model.
    """
    Checker("", **sizes).tensor(name, value, letters, dtypes, device, "the model's embeddings")
    return value


_NAMES = {int: "an integer", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
_MISSING = object()
_hints = cache(get_type_hints)


def check_types(owner: str, config: Any, infinite: Sequence[str] = ()) -> None:
    """Raises ValueError unless each field has a value of its annotated type; numbers become Python's own.

    Integers may stand for numbers; bools are no integers; numbers are finite, but those of the fields in ``infinite``.
    ``owner`` begins the message.
    """
    hints = _hints(config.__class__)
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), _kinds(hints[field.name])
        if field.name in infinite and value == math.inf:
            continue
        found = next((x for x in (_converted(value, kind) for kind in kinds) if x is not _MISSING), _MISSING)
        if found is _MISSING:
            wanted = " or ".join(_NAMES.get(kind, repr(kind)) for kind in kinds)
            raise ValueError(f"{owner}: {field.name} must be {wanted}, got {shown(value)}")
        if isinstance(found, str):
            unicode(f"{owner}: {field.name}", found)
        object.__setattr__(config, field.name, found)


def _kinds(hint: Any) -> list[Any]:
    """The types, and the values of literals, that a value may have."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


def _converted(value: Any, kind: Any) -> Any:
    if kind is int:
        found = as_integer(value)
        return _MISSING if found is None or abs(found) > LARGEST_INTEGER else found
    if kind is float:
        number = as_number(value)
        return _MISSING if number is None or not math.isfinite(number) else number
    if isinstance(kind, type):
        return value if isinstance(value, kind) else _MISSING
    return value if isinstance(value, str) and value == kind else _MISSING


def check(owner: str, config: Any, name: str, ok: bool, wanted: str) -> None:
    """Raises ValueError, about a field of ``config``, unless ``ok``."""
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


def check_instance(op: str, name: str, value: Any, cls: type) -> None:
    if not isinstance(value, cls):
        raise TypeError(f"{op}: {name} must be a {cls.__name__}, got {shown(value)}")


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
        return ValueError(f"{self.op}: {message}" if self.op else message)

    def tensor(
        self,
        name: str,
        value: Any,
        letters: str,
        dtype: Sequence[torch.dtype] | None = None,
        device: torch.device | None = None,
        like: str = "",
    ) -> None:
        """``letters`` are the dimensions, comma-separated, such as ``"B,G,M,K"``; "..." are any. Raises ValueError.

        ``like``, for the error: the argument that sets dtype and device.
        """
        if not isinstance(value, Tensor):
            raise self.fail(f"{name} must be a tensor [{letters}], got {shown(value)}")
        if hasattr(value, "full_tensor"):
            raise self.fail(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")
        keys, sizes, got = letters.split(",") if letters else [], self.sizes, value.shape
        before = len(sizes)
        if letters != "..." and (len(got) != len(keys) or tuple(map(sizes.setdefault, keys, got)) != got):
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

    def sequences(self, value: Iterable[Any]) -> list[Tensor]:
        """Token ids, each a list or an integer tensor [T], as int64 on the host. Raises ValueError."""
        if not isinstance(value, Iterable):
            raise self.fail(f"sequences must be a list of lists or tensors of token ids, got {shown(value)}")
        tensors = []
        for i, given in enumerate(value):
            try:
                ids = given if isinstance(given, Tensor) else torch.as_tensor(given, device=HOST)
            except (TypeError, ValueError, RuntimeError):
                raise self.fail(f"sequence {i} must be integers [T] of 64 bits, got {shown(given)}") from None
            if ids.ndim != 1 or (ids.numel() and ids.dtype not in INTEGERS):
                raise self.fail(f"sequence {i} must be integers [T], got {ids.dtype} {list(ids.shape)}")
            if not has_values(ids):
                raise self.fail(f"sequence {i} must have values, got a meta, fake or traced tensor")
            tensors.append(ids.to(HOST, torch.int64))
        return tensors

    def banned(self, value: Any) -> list[int]:
        """Ids of any integer type, sorted and without duplicates."""
        try:
            return sorted({operator.index(token) for token in value})
        except TypeError:
            raise self.fail(f"banned must be a sequence of ids, got {shown(value)}") from None

    def last_strides_one(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            if value.stride(-1) != 1 and value.shape[-1] > 1 and value.numel():
                raise self.fail(f"{name} must have a last stride of 1, got strides {list(value.stride())}")

    def positive(self, name: str, value: Any, zero: bool = False) -> float:
        """A finite number above zero; with ``zero``, zero too."""
        found = value if type(value) is float else as_number(value)
        if found is None or not (0 < found < math.inf or (zero and found == 0)):
            raise self.fail(f"{name} must be {'zero or ' if zero else ''}a positive finite number, got {shown(value)}")
        return float(found)

    def temperature(self, value: Any, zero: bool = False) -> float:
        """Not above fp32's largest, where some back ends would divide by infinity."""
        return self.in_fp32("temperature", self.positive("temperature", value, zero))

    def in_fp32(self, name: str, value: T) -> T:
        """A number or None, as it is. Raises ValueError beyond fp32's largest."""
        if isinstance(value, float) and abs(value) > LARGEST_FP32:
            raise self.fail(f"{name} must be at most {LARGEST_FP32:.2e}, the largest of float32, got {shown(value)}")
        return value

    def fraction(self, name: str, value: Any) -> float:
        found = as_number(value)
        if found is None or not 0 <= found <= 1:
            raise self.fail(f"{name} must be a number from 0 to 1, got {shown(value)}")
        return float(found)

    def positive_or_none(self, name: str, value: Any) -> float | None:
        return None if value is None else self.positive(name, value)

    def finite_or_none(self, name: str, value: Any) -> float | None:
        if value is None:
            return None
        found = as_number(value)
        if found is None or not math.isfinite(found):
            raise self.fail(f"{name} must be finite, got {shown(value)}")
        return float(found)

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
        return flag(f"{self.op}: {name}", value)

    def choice(self, name: str, value: Any, choices: Sequence[str]) -> str:
        return choice(f"{self.op}: {name}", value, choices)

    def device(self, value: Any) -> torch.device:
        """The argument ``device``: a torch.device or the name of one."""
        try:
            if isinstance(value, (str, torch.device)):
                return torch.device(value)
        except RuntimeError:
            pass
        raise self.fail(f"device must be a device such as cpu, cuda or cuda:1, got {shown(value)}")


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Where autocast is on, tensors of several dtypes in its dtype, as ``linear`` takes them; equal ones, and fp64, stay."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtypes = {x.dtype for x in tensors if isinstance(x, Tensor)}
    if len(dtypes) < 2 or not dtypes.issubset(FLOATS[:3]):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) if isinstance(x, Tensor) else x for x in tensors)


def check_head(
    check: Checker,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    banned: Iterable[int],
    whose: str = "",
    width: str = "D",
) -> tuple[float | None, float | None, list[int]]:
    """Checks the arguments that the vocabulary ops share. Returns scale, softcap, and ``banned`` sorted, without duplicates.

    ``whose`` is what their names begin with, and ``width`` the letter of theirs.
    """
    like = f"{whose}hidden"
    check.tensor(like, hidden, f"R,{width}", FLOATS)
    check.tensor(f"{whose}weight", weight, f"V,{width}", (hidden.dtype,), hidden.device, like)
    if bias is not None:
        check.tensor(f"{whose}bias", bias, "V", (hidden.dtype,), hidden.device, like)
    softcap = check.positive_or_none(f"{whose}softcap", softcap)
    scale = check.finite_or_none(f"{whose}scale", scale)
    if check["V"] == 0:
        raise check.fail("weight must have at least one row, V=0")
    if type(banned) is tuple and not banned:
        return scale, softcap, []
    ids = check.banned(banned)
    if ids and not (0 <= ids[0] and ids[-1] < check["V"]):
        raise check.fail(f"banned ids must be from 0 to V-1={check['V'] - 1}, got {shown(ids)}")
    if len(ids) == check["V"]:
        raise check.fail(f"banned must leave at least one of the V={check['V']} ids")
    return scale, softcap, ids


def check_attention(check: Checker, keys: str, values: str, sinks: Tensor | None, device: torch.device) -> None:
    """Checks what the attention ops share, once their tensors are checked; ``keys`` and ``values`` name two of these."""
    if check["G"] == 0 or check["H"] % check["G"]:
        raise check.fail(f"H must be a multiple of G, got H={check['H']} in q, G={check['G']} in {keys}")
    for letter, name in (("K", "q"), ("E", values)):
        if not 1 <= check[letter] <= 256:
            raise check.fail(f"head width {letter} must be from 1 to 256, got {check[letter]} in {name}")
    if sinks is not None:
        check.tensor("sinks", sinks, "H", FLOATS, device, "layout")


def check_steps(check: Checker, own: str) -> None:
    """For functions that make the rows of a thought one after another."""
    if own == "full":
        raise check.fail("layout must have own='causal', got own='full': a step can't see rows that are not there yet")


def check_targets(check: Checker, targets: Tensor, banned: list[int]) -> None:
    """Checks the values, unless reading them would wait for a GPU."""
    if not on_host(targets) or torch.compiler.is_compiling():
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
