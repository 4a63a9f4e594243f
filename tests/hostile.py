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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch

from tests.hostile_values import hostile_value
from tests.limits import SECONDS, Hang, limits

__all__ = ["Tally", "Target", "attack", "public_functions"]


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


def public_functions(module: ModuleType) -> set[str]:
    """Names of what docs/api.md lists of a module and that takes arguments: functions, constructors, documented methods."""
    found = set()
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isroutine(thing) or inspect.isclass(thing):
            found.add(name)
        if inspect.isclass(thing):
            members = {member: getattr(thing, member) for member in vars(thing) if not member.startswith("_")}
            found |= {f"{name}.{key}" for key, member in members.items() if inspect.isroutine(member) and member.__doc__}
    return {name for name in found if takes_arguments(module, name)}


def takes_arguments(module: ModuleType, name: str) -> bool:
    thing = attrgetter(name)(module)
    return bool(inspect.signature(thing).parameters.keys() - {"self"})


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
    except OSError as error:
        if not files:
            return f"{call}\n{described(error)}"
        tally.refused += 1
    except (ValueError, TypeError) as error:
        named = any(re.search(rf"\b{name}\b", str(error)) for name in may_name) or any(x in str(error) for x in files)
        # Subclasses such as UnicodeEncodeError are what Python raises, not what a check does.
        if type(error) not in (ValueError, TypeError) or not named:
            return f"{call}\n{described(error)}"
        tally.refused += 1
    except Hang as hang:
        return f"{call}\n    {hang}"
    except Exception as error:
        return f"{call}\n{described(error)}"
    if time.monotonic() - start > seconds:
        return f"{call}\n    took {time.monotonic() - start:.0f} s"
    return None


def described(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).partition("\n")[0][:300]
    return f"    {type(error).__name__}: {message}\n    {frame.filename}:{frame.lineno}".encode(errors="replace").decode()
