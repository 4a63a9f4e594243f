"""Each check takes what it should, as Python's own type, and refuses the rest in one sentence."""

import re
from pathlib import Path

import numpy
import pytest
import torch

from quietstar.arguments import values


@pytest.mark.parametrize("value", [3, numpy.int64(3), numpy.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)])
def test_integers_of_every_type_become_ints(value):
    found = values.integer("f: x", value, 1, 5)
    assert type(found) is int and found == 3


@pytest.mark.parametrize("value", [0.5, numpy.float32(0.5), numpy.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_every_type_become_floats(value):
    found = values.number("f: x", value, least=0)
    assert type(found) is float and found == 0.5


def test_an_integer_may_stand_for_a_number():
    assert type(values.number("x", 2)) is int


META = torch.tensor(3, device="meta")
REFUSED = [
    (lambda: values.integer("f: x", 1.5), "f: x must be an integer, got 1.5"),
    (lambda: values.integer("x", 2.0), "x must be an integer, got 2.0"),
    (lambda: values.integer("x", True), "x must be an integer, got True"),
    (lambda: values.integer("x", "3"), "x must be an integer, got '3'"),
    (lambda: values.integer("x", torch.tensor([3])), "x must be an integer, got a tensor of int64 [1]"),
    (lambda: values.integer("x", torch.tensor(True)), "x must be an integer, got a tensor of bool []"),
    (lambda: values.integer("x", META), "x must be an integer, got a tensor of int64 []"),
    (lambda: values.integer("x", object()), "x must be an integer, got object"),
    (lambda: values.integer("x", 0, 1), "x must be 1 or more, got 0"),
    (lambda: values.integer("x", torch.tensor(-1), 0, 70_000), "x must be 0 to 70,000, got -1"),
    (lambda: values.seed_bits("seed", 2**64), "seed must be an integer of 64 bits, got 18446744073709551616"),
    (lambda: values.seed_bits("seed", 1.5), "seed must be an integer of 64 bits, got 1.5"),
    (lambda: values.number("x", float("nan")), "x must be a finite number, got nan"),
    (lambda: values.number("x", float("inf")), "x must be a finite number, got inf"),
    (lambda: values.number("x", -float("inf")), "x must be a finite number, got -inf"),
    (lambda: values.number("x", True), "x must be a finite number, got True"),
    (lambda: values.number("x", "0.5"), "x must be a finite number, got '0.5'"),
    (lambda: values.number("x", 0.5j), "x must be a finite number, got complex"),
    (lambda: values.number("x", 10**400), "x must be a finite number, got 1000"),
    (lambda: values.number("x", 10**5000), "x must be a finite number, got int"),
    (lambda: values.number("x", 0, "above 0", above=0), "x must be above 0, got 0"),
    (lambda: values.number("x", -0.5, "0 or more", least=0), "x must be 0 or more, got -0.5"),
    (lambda: values.flag("x", 1), "x must be True or False, got 1"),
    (lambda: values.choice("x", "c", ("a", "b")), "x must be one of a, b, got 'c'"),
    (lambda: values.choice("x", ["a"], ("a", "b")), "x must be one of a, b, got ['a']"),
    (lambda: values.unicode("x", b"a"), "x must be a str, got bytes"),
    (lambda: values.unicode("x", "a\ud800"), "x must be valid Unicode, character 1 is half of a surrogate pair: '\\ud800'"),
    (lambda: values.file_path("x", 3), "x must be a path, got 3"),
    (lambda: values.file_path("x", "a\0b"), "x must be a path, got 'a\\x00b'"),
    (lambda: values.function("x", 3), "x must be a function, got 3"),
    (lambda: values.instance("x", [], Path), "x must be a Path, got []"),
    (lambda: values.mapping("x", []), "x must be a dict, got []"),
    (lambda: values.items("x", "ab"), "x must be a sequence, got 'ab'"),
    (lambda: values.items("x", [], 1), "x must have at least 1 item, got 0"),
    (lambda: values.instance("x", "a" * 1000, int), "x must be an int, got 'aaa"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert len(str(caught.value)) < 200


def test_tensors():
    ids = torch.zeros(2, 3, 4)
    assert values.tensor("x", ids, "B,L,D", {"B": 2, "D": 4}, torch.device("cpu"), values.FLOATS) is ids
    assert values.tensor("x", ids, "...,D", {"D": 4}) is ids
    assert values.tensor("x", ids, "...", {}) is ids


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: values.tensor("x", [1], "B,L", {}), "x must be a tensor [B,L], got [1]"),
        (lambda x: values.tensor("x", x.to_sparse(), "B,L", {}), "x must be a dense tensor [B,L], got a tensor of float32"),
        (lambda x: values.tensor("x", x, "B", {}), "x must have shape [B], got [2, 3]"),
        (lambda x: values.tensor("x", x, "B,L", {"L": 4}), "x must have shape [B,L]=[?, 4], got [2, 3]"),
        (lambda x: values.tensor("x", x, "...,D", {"D": 4}), "x must have shape [...,D]=[..., 4], got [2, 3]"),
        (lambda x: values.tensor("x", x[0, 0], "...,D", {}), "x must have shape [...,D], got []"),
        (
            lambda x: values.tensor("x", x.to("meta"), "B,L", {}, x.device),
            "x must be on cpu like the model's embeddings, got meta",
        ),
        (lambda x: values.tensor("x", x, "B,L", {}, dtypes=values.INTEGERS), "x must be int32 or int64, got float32"),
    ],
)
def test_tensors_that_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(2, 3))
