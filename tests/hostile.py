"""Calls of public functions with hostile arguments, and the rule that they must keep.

A call may succeed. If it doesn't, it raises ValueError or TypeError with the name of an argument that was replaced, within
20 seconds. A value that is right for itself and wrong beside the others, such as a tensor of another size, may be refused by
the name of any argument. A file may be refused by its own name, and its errors may be OSError.
"""

from __future__ import annotations

import inspect
import random
import re
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch

from tests.limits import SECONDS, Hang, limits


@dataclass
class Target:
    """A function to attack.

    Args:
        name: as a reader would write the call.
        function: called with keyword arguments alone.
        good: makes arguments that work, anew for each call, since a call may change them.
        replaces: the arguments that are replaced; default all of them.
        paths: those that are files or folders.
    """

    name: str
    function: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    replaces: Sequence[str] = ()
    paths: Sequence[str] = ()


@dataclass
class Tally:
    """What became of the calls: ``broken`` has a paragraph for each that broke the rule."""

    calls: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {"tried": self.calls, "refused by name": self.refused, "broke the rule": len(self.broken)}


def attack(target: Target, calls: int, seed: int = 0, first: int = 0, seconds: float = SECONDS) -> Tally:
    """Calls ``first`` to ``first + calls - 1`` of the seed's. To repeat a broken one, pass its number and ``calls=1``."""
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(first, first + calls):
            problem = attack_once(target, seed, number, seconds, tally)
            tally.calls += 1
            if problem:
                tally.broken.append(problem)
    return tally


def attack_once(target: Target, seed: int, number: int, seconds: float, tally: Tally) -> str | None:
    rng = random.Random(f"{target.name} {seed} {number}")
    torch.manual_seed(number)
    arguments = target.good()
    names = list(target.replaces or arguments)
    chosen = rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2, 3))))
    parameters = inspect.signature(target.function).parameters
    hostile = {}
    for name in chosen:
        hostile[name] = hostile_value(arguments[name], rng)
        if hostile[name].value is None and name in parameters and parameters[name].default is None:
            hostile[name] = hostile[name]._replace(fits=True)
    arguments.update({name: h.value for name, h in hostile.items()})
    may_name = set(arguments) if any(h.fits for h in hostile.values()) else set(chosen)
    may_name |= {name for h in hostile.values() for name in h.inside}
    paths = [arguments[name] for name in target.paths if name in may_name]
    files = [text for path in paths if isinstance(path, str) for text in (path, repr(path)[1:-1])]

    call = f"{target.name}({', '.join(f'{name}={h.text}' for name, h in hostile.items())})  # seed {seed}, call {number}"
    start = time.monotonic()
    try:
        with limits(seconds):
            target.function(**arguments)
    except (Hang, Exception) as error:
        named = any(re.search(rf"\b{name}\b", str(error)) for name in may_name) or any(x in str(error) for x in files)
        # Subclasses such as UnicodeEncodeError are what Python raises, not what a check does.
        if not (named and type(error) in (ValueError, TypeError) or files and isinstance(error, OSError)):
            return f"{call}\n{described(error)}"
        tally.refused += 1
    if time.monotonic() - start > seconds:
        return f"{call}\n    took {time.monotonic() - start:.0f} s"
    return None


def described(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).partition("\n")[0][:300]
    return f"    {type(error).__name__}: {message}\n    {frame.filename}:{frame.lineno}".encode(errors="replace").decode()


class Hostile(NamedTuple):
    text: str  # how to write it
    value: Any
    fits: bool = False  # right for itself, perhaps not beside the other arguments
    inside: tuple[str, ...] = ()  # names inside the argument that an error may give instead


# Expressions by kind: what may be right in itself, and what never is.
VALUES = {
    "int": (
        ["0", "1", "2", "7", "10**6", "2**31 - 1", "tensor(3)", "numpy.int64(3)"],
        ["-1", "-2**40", "2**31", "2**40", "2**63 - 1", "2**63", "2**64", "-2**63 - 1", "10**30", "1.5", "2.0", "True", "'3'"]
        + ["None", "nan", "inf", "[3]", "tensor(-1)", "tensor(1.5)", "tensor([3])", "tensor(3, device='meta')", "3j"]
        + ["numpy.float32(1.5)"],
    ),
    "float": (
        ["0.0", "1e-45", "1e39", "1e300", "2", "tensor(0.5)", "numpy.float64(0.5)"],
        ["nan", "inf", "-inf", "-0.5", "10**400", "True", "'0.5'", "'nan'", "None", "[0.5]", "0.5j", "tensor(nan)", "{}"]
        + ["tensor([0.5, 0.5])", "numpy.float32('nan')"],
    ),
    "bool": (
        ["not good"],
        ["2", "1.0", "nan", "'false'", "None", "[]", "tensor([True, False])", "numpy.array([1, 2])", "object()"],
    ),
    "str": (
        [],
        ["''", "' '", "'no such choice'", r"'\ud800'", r"'a\0b'", r"'\n'", "'x' * 5000", "'../x'", "b'bytes'", "3", "0.5"]
        + ["True", "None", "['x']", "{'x': 1}", "object()"],
    ),
    "sequence": (
        ["[]", "()", "[*good, *good]", "[*good][:1]"],
        ["[None]", "[1.5]", "[-1]", "[True]", "[2**63]", "['a']", "[[0]]", "[nan]", r"['\ud800']", "'12'", "3", "None"]
        + ["{'x': 1}", "iter([0])", "numpy.array([0.5])", "tensor([1.5])", "tensor(1)", "[object()]"],
    ),
    "mapping": (["{}"], ["{'no such name': 1}", "{1: 2}", "{None: None}", "[]", "[('x', 1)]", "'x'", "3", "None", "object()"]),
    "tensor": (
        ["good.to('meta')", "zeros_like(good)", "good[:0]", "good[:1]", "good[..., :0]", "good[..., :-1]", "cat([good, good])"]
        + ["cat([good, good], -1)", "good.mT.contiguous().mT", "good[:1].expand(good.shape)", "good.transpose(0, 1)"],
        ["None", "good.tolist()", "good.float().numpy()", "3", "'x'", "good[None]", "good.flatten()", "good.flatten()[0]"]
        + ["good[..., None]", "good.to_sparse()", "good.to(torch.complex64)", "good.bool()", "good.to(torch.uint8)", "good[0]"]
        + ["good.double() * nan", "torch.full_like(good, 2**31, dtype=torch.float32)", "torch.empty(0)"],
    ),
    "floats": (
        ["good.half()", "good.double()", "good.float() + 0.5", "good * nan", "good * inf"],
        ["good.long()", "good.int()"],
    ),
    "ints": (
        ["good.long()", "good.int()", "good.flip(-1)"],
        ["good.half()", "good.double()", "good + 0.5", "torch.full(good.shape, -(2**63))", "torch.full(good.shape, 2**63 - 1)"],
    ),
    "object": (
        [],
        ["None", "[]", "{}", "()", "''", "'x'", "0", "3", "nan", "True", "object()", "SimpleNamespace()", "tensor(3)"]
        + ["len", "int", "torch.nn.Linear(2, 2)", "type(good)"],
    ),
}
NAMES = vars(torch) | {"torch": torch, "numpy": numpy, "SimpleNamespace": SimpleNamespace}


def hostile_value(good: Any, rng: random.Random) -> Hostile:
    """Mostly of the kind of ``good``, sometimes of any other."""
    own = rng.random() < 0.75
    if own and isinstance(good, Mapping) and good and rng.random() < 0.5:
        name = rng.choice(sorted(good))
        item = hostile_value(good[name], rng)
        return Hostile(f"{{**good, {name!r}: {item.text}}}", good | {name: item.value}, item.fits, (name, *item.inside))
    if own and isinstance(good, list | tuple) and good and rng.random() < 0.4:
        item = hostile_value(good[0], rng)
        return Hostile(f"[{item.text}, *good[1:]]", [item.value, *good[1:]], item.fits, item.inside)
    fits, never = VALUES[kind(good) if own else rng.choice(["int", "float", "str", "bool", "sequence", "mapping", "object"])]
    if own and isinstance(good, torch.Tensor):
        more = VALUES["floats" if good.is_floating_point() else "ints"]
        fits, never = fits + more[0], never + more[1]
    if callable(good) and not isinstance(good, torch.nn.Module):  # what another function does with its arguments is its own
        never = [text for text in never if text not in ("len", "int", "torch.nn.Linear(2, 2)", "type(good)")]
    while True:
        text = rng.choice(fits + never)
        try:
            value = eval(text, NAMES | {"good": good.detach() if isinstance(good, torch.Tensor) else good})
        except (IndexError, RuntimeError, TypeError):  # not of a tensor of this shape
            continue
        names = tuple(map(str, value)) if isinstance(value, dict) else ()
        return Hostile(text, value, own and text in fits, names)


def kind(good: Any) -> str:
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "tensor": torch.Tensor, "mapping": Mapping}
    for name, types in (kinds | {"sequence": (list, tuple, set)}).items():
        if isinstance(good, types):
            return name
    return "object"
