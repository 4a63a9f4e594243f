"""Each check takes what it should, as Python's own type, and refuses the rest in one sentence; so do the fields of configs."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy
import pytest
import torch

from quietstar_kernels import checks


@pytest.mark.parametrize("value", [3, numpy.int64(3), numpy.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)])
def test_integers_of_every_type_become_ints(value):
    found = checks.integer("f: x", value, 1, 5)
    assert type(found) is int and found == 3


@pytest.mark.parametrize("value", [0.5, numpy.float32(0.5), numpy.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_every_type_become_floats(value):
    found = checks.number("f: x", value, least=0)
    assert type(found) is float and found == 0.5


def test_an_integer_may_stand_for_a_number():
    assert type(checks.number("x", 2)) is int


META = torch.tensor(3, device="meta")
REFUSED = [
    (lambda: checks.integer("f: x", 1.5), "f: x must be an integer, got 1.5"),
    (lambda: checks.integer("x", 2.0), "x must be an integer, got 2.0"),
    (lambda: checks.integer("x", True), "x must be an integer, got True"),
    (lambda: checks.integer("x", "3"), "x must be an integer, got '3'"),
    (lambda: checks.integer("x", torch.tensor([3])), "x must be an integer, got a tensor [1] of int64"),
    (lambda: checks.integer("x", torch.tensor(True)), "x must be an integer, got a tensor [] of bool"),
    (lambda: checks.integer("x", META), "x must be an integer, got a tensor [] of int64"),
    (lambda: checks.integer("x", object()), "x must be an integer, got object"),
    (lambda: checks.integer("x", 0, 1), "x must be 1 or more, got 0"),
    (lambda: checks.integer("x", torch.tensor(-1), 0, 70_000), "x must be 0 to 70,000, got -1"),
    (lambda: checks.seed_bits("seed", 2**64), "seed must be an integer of 64 bits, got 18446744073709551616"),
    (lambda: checks.seed_bits("seed", 1.5), "seed must be an integer of 64 bits, got 1.5"),
    (lambda: checks.number("x", float("nan")), "x must be a finite number, got nan"),
    (lambda: checks.number("x", float("inf")), "x must be a finite number, got inf"),
    (lambda: checks.number("x", -float("inf")), "x must be a finite number, got -inf"),
    (lambda: checks.number("x", True), "x must be a finite number, got True"),
    (lambda: checks.number("x", "0.5"), "x must be a finite number, got '0.5'"),
    (lambda: checks.number("x", 0.5j), "x must be a finite number, got complex"),
    (lambda: checks.number("x", 10**400), "x must be a finite number, got 1000"),
    (lambda: checks.number("x", 10**5000), "x must be a finite number, got int"),
    (lambda: checks.number("x", Fraction(10**400)), "x must be a finite number, got Fraction"),
    (lambda: checks.number("x", 0, "above 0", above=0), "x must be above 0, got 0"),
    (lambda: checks.number("x", -0.5, "0 or more", least=0), "x must be 0 or more, got -0.5"),
    (lambda: checks.flag("x", 1), "x must be True or False, got 1"),
    (lambda: checks.choice("x", "c", ("a", "b")), "x must be one of a, b, got 'c'"),
    (lambda: checks.choice("x", ["a"], ("a", "b")), "x must be one of a, b, got ['a']"),
    (lambda: checks.unicode("x", b"a"), "x must be a str, got bytes"),
    (lambda: checks.unicode("x", "a\ud800"), "x must be valid Unicode, character 1 is half of a surrogate pair: '\\ud800'"),
    (lambda: checks.file_path("x", 3), "x must be a path, got 3"),
    (lambda: checks.file_path("x", "a\0b"), "x must be a path, got 'a\\x00b'"),
    (lambda: checks.function("x", 3), "x must be a function, got 3"),
    (lambda: checks.instance("x", [], Path), "x must be a Path, got []"),
    (lambda: checks.mapping("x", []), "x must be a dict, got []"),
    (lambda: checks.items("x", "ab"), "x must be a sequence, got 'ab'"),
    (lambda: checks.items("x", [], 1), "x must have at least 1 item, got 0"),
    (lambda: checks.instance("x", "a" * 1000, int), "x must be an int, got 'aaa"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert len(str(caught.value)) < 200


def test_tensors():
    ids = torch.zeros(2, 3, 4)
    assert checks.tensor("x", ids, "B,L,D", {"B": 2, "D": 4}, torch.device("cpu"), checks.FLOATS) is ids
    assert checks.tensor("x", ids, "...", {}) is ids


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: checks.tensor("x", [1], "B,L", {}), "x must be a tensor [B,L], got [1]"),
        (lambda x: checks.tensor("x", x.to_sparse(), "B,L", {}), "x must be a dense tensor, got one of layout sparse_coo"),
        (lambda x: checks.tensor("x", x, "B", {}), "x must have shape [B]=[?], got [2,3]"),
        (lambda x: checks.tensor("x", x, "B,L", {"L": 4}), "x must have shape [B,L]=[?,4], got [2,3]"),
        (
            lambda x: checks.tensor("x", x.to("meta"), "B,L", {}, x.device),
            "x must be on cpu like the model's embeddings, got meta",
        ),
        (lambda x: checks.tensor("x", x, "B,L", {}, dtypes=checks.INTEGERS), "x must have dtype int32, int64, got float32"),
    ],
)
def test_tensors_that_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(2, 3))


@dataclass
class Config:
    count: int = 1
    share: float = 0.5
    on: bool = True
    name: str = "a"
    kind: Literal["x", "y"] = "x"
    size: int | Literal["auto"] | None = None
    start: int | str | None = None

    def __post_init__(self):
        checks.check_types("Config", self)


def test_numbers_of_fields_become_pythons_own():
    config = Config(count=numpy.int64(3), share=numpy.float32(0.5), size=numpy.int32(2))
    assert [type(x) for x in (config.count, config.share, config.size)] == [int, float, int]
    assert Config(share=1).share == 1


@pytest.mark.parametrize(
    "fields", [{"size": "auto"}, {"size": 4}, {"start": "---"}, {"start": 7}, {"kind": "y"}, {"on": False}]
)
def test_each_part_of_a_union_is_taken(fields):
    assert vars(Config(**fields)).items() >= fields.items()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"count": None}, "Config: count must be an integer, got None"),
        ({"count": 2**63}, "Config: count must be an integer, got 9223372036854775808"),
        ({"share": float("nan")}, "Config: share must be a finite number, got nan"),
        ({"on": 1}, "Config: on must be True or False, got 1"),
        ({"name": ["a"]}, "Config: name must be text, got ['a']"),
        ({"name": "\ud800"}, "Config: name must be valid Unicode, character 0"),
        ({"kind": "z"}, "Config: kind must be 'x' or 'y', got 'z'"),
        ({"kind": ["x"]}, "Config: kind must be 'x' or 'y', got ['x']"),
        ({"size": "all"}, "Config: size must be an integer or 'auto' or None, got 'all'"),
        ({"start": 1.5}, "Config: start must be an integer or text or None, got 1.5"),
    ],
)
def test_another_type_of_a_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**fields)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda config: checks.check("f", config, "count", False, "odd"), "f: count must be odd, got 1"),
        (lambda config: checks.check_at_least("f", config, 2, ("count",)), "f: count must be 2 or more, got 1"),
        (lambda config: checks.check_positive("f", Config(share=0.0), ("share",)), "f: share must be above 0, got 0.0"),
        (lambda config: checks.check_choice("f", config, "name", ("b", "c")), "f: name must be one of b, c, got 'a'"),
    ],
)
def test_ranges_of_fields(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Config())
