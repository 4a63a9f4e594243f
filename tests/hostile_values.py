"""Hostile values in place of a good one: of its own kind, with other sizes, types and numbers, or of any other kind."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor


class Hostile(NamedTuple):
    text: str  # how to write it
    value: Any
    fits: bool = False  # right for itself, perhaps not beside the other arguments
    inside: tuple[str, ...] = ()  # names inside the argument that an error may give instead


def hostile_value(good: Any, rng: random.Random) -> Hostile:
    """Mostly of the kind of ``good``, sometimes of any other."""
    pools = [ints, floats, strings, booleans, sequences, mappings, tensors, objects]
    own = kind(good)
    pool = own if rng.random() < 0.75 else rng.choice(pools)
    return rng.choice(pool(good if pool is own else None, rng))


def kind(good: Any) -> Callable[[Any, random.Random], list[Hostile]]:
    kinds = ((bool, booleans), (int, ints), (float, floats), (str, strings), (Tensor, tensors), (Mapping, mappings))
    for of, pool in kinds:
        if isinstance(good, of):
            return pool
    return sequences if isinstance(good, (list, tuple, set)) else objects


def ints(good: int | None, rng: random.Random) -> list[Hostile]:
    fits = good is not None
    return [
        *(Hostile(str(value), value, fits) for value in (0, 1, 2, 7)),
        *(Hostile(str(value), value, fits) for value in (10**6, 2**31 - 1)),
        Hostile("-1", -1),
        Hostile("-2**40", -(2**40)),
        Hostile("2**31", 2**31),
        Hostile("2**40", 2**40),
        Hostile("2**63 - 1", 2**63 - 1),
        Hostile("2**63", 2**63),
        Hostile("2**64", 2**64),
        Hostile("-2**63 - 1", -(2**63) - 1),
        Hostile("10**30", 10**30),
        Hostile("1.5", 1.5),
        Hostile("2.0", 2.0),
        Hostile("True", True),
        Hostile("'3'", "3"),
        Hostile("None", None),
        Hostile("nan", float("nan")),
        Hostile("inf", float("inf")),
        Hostile("[3]", [3]),
        Hostile("tensor(3)", torch.tensor(3), fits),
        Hostile("tensor(-1)", torch.tensor(-1)),
        Hostile("tensor(1.5)", torch.tensor(1.5)),
        Hostile("tensor([3])", torch.tensor([3])),
        Hostile("tensor(3, device='meta')", torch.tensor(3, device="meta")),
        Hostile("numpy.int64(3)", numpy.int64(3), fits),
        Hostile("numpy.float32(1.5)", numpy.float32(1.5)),
        Hostile("3j", 3j),
    ]


def floats(good: float | None, rng: random.Random) -> list[Hostile]:
    fits = good is not None
    return [
        Hostile("nan", float("nan")),
        Hostile("inf", float("inf")),
        Hostile("-inf", -float("inf")),
        Hostile("0.0", 0.0, fits),
        Hostile("-0.5", -0.5),
        Hostile("1e-45", 1e-45, fits),
        Hostile("1e39", 1e39, fits),
        Hostile("1e300", 1e300, fits),
        Hostile("2", 2, fits),
        Hostile("10**400", 10**400),
        Hostile("True", True),
        Hostile("'0.5'", "0.5"),
        Hostile("'nan'", "nan"),
        Hostile("None", None),
        Hostile("[0.5]", [0.5]),
        Hostile("0.5j", 0.5j),
        Hostile("tensor(0.5)", torch.tensor(0.5), fits),
        Hostile("tensor(nan)", torch.tensor(float("nan"))),
        Hostile("tensor([0.5, 0.5])", torch.tensor([0.5, 0.5])),
        Hostile("numpy.float32('nan')", numpy.float32("nan")),
        Hostile("numpy.float64(0.5)", numpy.float64(0.5), fits),
        Hostile("{}", {}),
    ]


def booleans(good: bool | None, rng: random.Random) -> list[Hostile]:
    return [
        Hostile("not the default", not good, good is not None),
        Hostile("2", 2),
        Hostile("1.0", 1.0),
        Hostile("nan", float("nan")),
        Hostile("'false'", "false"),
        Hostile("None", None),
        Hostile("[]", []),
        Hostile("tensor([True, False])", torch.tensor([True, False])),
        Hostile("numpy.array([1, 2])", numpy.array([1, 2])),
        Hostile("object()", object()),
    ]


def strings(good: str | None, rng: random.Random) -> list[Hostile]:
    return [
        Hostile("''", ""),
        Hostile("' '", " "),
        Hostile("'no such choice'", "no such choice"),
        Hostile("'\\ud800'", "\ud800"),
        Hostile("'a\\0b'", "a\0b"),
        Hostile("'\\n'", "\n"),
        Hostile("'x' * 5000", "x" * 5000),
        Hostile("'../x'", "../x"),
        Hostile("b'bytes'", b"bytes"),
        Hostile("3", 3),
        Hostile("0.5", 0.5),
        Hostile("True", True),
        Hostile("None", None),
        Hostile("['x']", ["x"]),
        Hostile("{'x': 1}", {"x": 1}),
        Hostile("object()", object()),
    ]


def sequences(good: Sequence | None, rng: random.Random) -> list[Hostile]:
    pool = [
        Hostile("[]", [], good is not None),
        Hostile("()", (), good is not None),
        *(Hostile(repr(items), items) for items in ([None], [1.5], [-1], [True], [2**63], ["a"], [[0]], [float("nan")])),
        Hostile("['\\ud800']", ["\ud800"]),
        Hostile("'12'", "12"),
        Hostile("3", 3),
        Hostile("None", None),
        Hostile("{'x': 1}", {"x": 1}),
        Hostile("iter([0])", iter([0])),
        Hostile("numpy.array([0.5])", numpy.array([0.5])),
        Hostile("tensor([1.5])", torch.tensor([1.5])),
        Hostile("tensor(1)", torch.tensor(1)),
        Hostile("[object()]", [object()]),
    ]
    items = list(good or ())
    if items:
        item = hostile_value(items[0], rng)
        pool += [Hostile(f"[{item.text}, *good]", [item.value, *items], item.fits, item.inside)] * 4
        pool += [Hostile(f"[*good[:-1], {item.text}]", [*items[:-1], item.value], item.fits, item.inside)] * 4
        pool += [Hostile("good * 2", items * 2, True), Hostile("good[:1]", items[:1], True)]
    return pool


def mappings(good: Mapping | None, rng: random.Random) -> list[Hostile]:
    pool = [
        Hostile("{}", {}, good is not None),
        Hostile("{'no such name': 1}", {"no such name": 1}, inside=("no such name",)),
        Hostile("{1: 2}", {1: 2}, inside=("1",)),
        Hostile("{None: None}", {None: None}, inside=("None",)),
        Hostile("[]", []),
        Hostile("[('x', 1)]", [("x", 1)]),
        Hostile("'x'", "x"),
        Hostile("3", 3),
        Hostile("None", None),
        Hostile("object()", object()),
    ]
    if good:
        name = rng.choice(sorted(good))
        value = hostile_value(good[name], rng)
        text, changed = f"{{**good, {name!r}: {value.text}}}", {**good, name: value.value}
        pool += [Hostile(text, changed, value.fits, (name, *value.inside))] * 8
    return pool


def objects(good: Any, rng: random.Random) -> list[Hostile]:
    pool = [
        Hostile("None", None),
        Hostile("[]", []),
        Hostile("{}", {}),
        Hostile("()", ()),
        Hostile("''", ""),
        Hostile("'x'", "x"),
        Hostile("0", 0),
        Hostile("3", 3),
        Hostile("nan", float("nan")),
        Hostile("True", True),
        Hostile("object()", object()),
        Hostile("SimpleNamespace()", SimpleNamespace()),
        Hostile("tensor(3)", torch.tensor(3)),
    ]
    if not callable(good) or isinstance(good, torch.nn.Module):  # what another function does with its arguments is its own
        pool += [Hostile("len", len), Hostile("int", int), Hostile("torch.nn.Linear(2, 2)", torch.nn.Linear(2, 2))]
    if good is not None and not inspect.isroutine(good):
        pool.append(Hostile(type(good).__name__, type(good)))
    return pool


def tensors(good: Tensor | None, rng: random.Random) -> list[Hostile]:
    """Changes of ``good``; of any tensor where there is none."""
    fits = good is not None
    if good is None:
        good = rng.choice([torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.rand(2, 3, 4), torch.zeros(0), torch.tensor(True)])
    good = good.detach()
    kept = good.is_floating_point()
    pool = [
        Hostile("None", None),
        Hostile("good.tolist()", good.tolist()),
        Hostile("good.numpy()", good.float().numpy() if good.dtype == torch.bfloat16 else good.numpy()),
        Hostile("3", 3),
        Hostile("'x'", "x"),
        Hostile("good[None]", good[None]),
        Hostile("good.flatten()", good.flatten()),
        Hostile("tensor(0)", torch.tensor(0).to(good.dtype)),
        Hostile("good[..., None]", good[..., None]),
        Hostile("good.to('meta')", good.to("meta"), fits),
        Hostile("good.to_sparse()", good.to_sparse()),
        Hostile("good.to(torch.complex64)", good.to(torch.complex64)),
        Hostile("good.bool()", good.bool()),
        Hostile("good.long()", good.long(), fits and not kept),
        Hostile("good.int()", good.int(), fits and not kept),
        Hostile("good.to(torch.uint8)", good.to(torch.uint8)),
        Hostile("good.half()", good.half(), fits and kept),
        Hostile("good.double()", good.double(), fits and kept),
        Hostile("good.float() + 0.5", good.float() + 0.5, fits and kept),
        Hostile("good.double() * nan", good.double() * float("nan")),
        Hostile("torch.full_like(good, inf or 2**31)", torch.full_like(good.float() if kept else good.long(), 2**31)),
        Hostile("torch.empty(0)", torch.empty(0)),
        Hostile("torch.zeros_like(good)", torch.zeros_like(good), fits),
    ]
    if good.dtype != torch.bool:
        pool += [Hostile("-good - 1", -good - 1, fits and kept), Hostile("good + 1000", good + 1000, fits and kept)]
        # A mask of many zeros and ones, or ids in another order.
        pool.append(Hostile("good.flip(-1)", good.flip(-1) if good.ndim else good + 1, fits))
    if kept:
        pool += [Hostile("good * nan", good * float("nan"), fits), Hostile("good * inf", good * float("inf"), fits)]
    if not kept and good.dtype != torch.bool:
        for extreme in (-(2**63), 2**63 - 1):
            pool.append(Hostile(f"torch.full_like(good, {extreme}, dtype=int64)", torch.full(good.shape, extreme)))
    if good.ndim:
        pool += [
            Hostile("good[:0]", good[:0], fits),
            Hostile("good[:1]", good[:1], fits),
            Hostile("good[..., :0]", good[..., :0], fits),
            Hostile("good[..., :-1]", good[..., :-1], fits),
            Hostile("good[0]", good[0] if len(good) else torch.tensor(0)),
            Hostile("torch.cat([good, good])", torch.cat([good, good]), fits),
            Hostile("torch.cat([good, good], -1)", torch.cat([good, good], -1), fits),
            Hostile("good.mT.contiguous().mT", good.mT.contiguous().mT if good.ndim > 1 else good.flip(0), fits),
            Hostile("good[:1].expand(good.shape)", good[:1].expand(good.shape) if len(good) else good, fits),
        ]
    if good.ndim > 1:
        pool.append(Hostile("good.transpose(0, 1)", good.transpose(0, 1), fits))
    return pool
