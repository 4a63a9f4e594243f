"""A config's fields have the types of their annotations."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy
import pytest

from quietstar_kernels.checks import check, check_at_least, check_choice, check_positive, check_types


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
        check_types("Config", self)


def test_numbers_become_pythons_own():
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
        ({"count": 1.5}, "Config: count must be an integer, got 1.5"),
        ({"count": True}, "Config: count must be an integer, got True"),
        ({"count": None}, "Config: count must be an integer, got None"),
        ({"count": 2**63}, "Config: count must be an integer, got 9223372036854775808"),
        ({"share": float("nan")}, "Config: share must be a finite number, got nan"),
        ({"share": float("inf")}, "Config: share must be a finite number, got inf"),
        ({"share": "0.5"}, "Config: share must be a finite number, got '0.5'"),
        ({"share": False}, "Config: share must be a finite number, got False"),
        ({"on": 1}, "Config: on must be True or False, got 1"),
        ({"name": ["a"]}, "Config: name must be text, got ['a']"),
        ({"name": "\ud800"}, "Config: name must be valid Unicode, character 0"),
        ({"kind": "z"}, "Config: kind must be 'x' or 'y', got 'z'"),
        ({"kind": ["x"]}, "Config: kind must be 'x' or 'y', got ['x']"),
        ({"size": "all"}, "Config: size must be an integer or 'auto' or None, got 'all'"),
        ({"start": 1.5}, "Config: start must be an integer or text or None, got 1.5"),
    ],
)
def test_another_type_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**fields)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda config: check("f", config, "count", False, "odd"), "f: count must be odd, got 1"),
        (lambda config: check_at_least("f", config, 2, ("count",)), "f: count must be 2 or more, got 1"),
        (lambda config: check_positive("f", Config(share=0.0), ("share",)), "f: share must be above 0, got 0.0"),
        (lambda config: check_choice("f", config, "name", ("b", "c")), "f: name must be one of b, c, got 'a'"),
    ],
)
def test_ranges(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Config())
