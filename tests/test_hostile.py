"""The attack finds what breaks the rule, and nothing else."""

import time

import pytest
import torch

from tests.hostile import Target, attack


def checked(count, share, ids):
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be 1 or more, got {count!r}")
    if not isinstance(share, float) or not 0 <= share <= 1:
        raise TypeError(f"share must be from 0 to 1, got {share!r}")
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError("ids must be int64 [R]")


def unchecked(count, share, ids):
    return torch.zeros(count)[ids] * share


def unnamed(count, share, ids):
    try:
        checked(count, share, ids)
    except Exception as error:
        raise ValueError("a bad argument") from error


def slow(count, share, ids):
    if count != 3:
        time.sleep(1)


def good():
    return {"count": 3, "share": 0.5, "ids": torch.arange(3)}


def test_a_function_that_checks_its_arguments_passes():
    tally = attack(Target("checked", checked, good), 150)
    assert not tally.broken
    assert tally.counts == {"tried": 150, "refused by name": tally.refused, "broke the rule": 0} and tally.refused > 100


@pytest.mark.parametrize("function", [unnamed, unchecked])
def test_one_that_does_not_is_found(function):
    target = Target(function.__name__, function, good)
    tally = attack(target, 60, seed=1)
    assert len(tally.broken) > 30
    number = int(tally.broken[0].partition("call ")[2].split()[0])
    assert attack(target, 1, seed=1, first=number).broken == tally.broken[:1]


def test_a_slow_call_is_found():
    tally = attack(Target("slow", slow, good, replaces=["count"]), 3, seconds=0.05)
    assert len(tally.broken) == 3 and "no end after" in tally.broken[0]
