"""Batched and naive methods sample the same thoughts. If they don't, the benchmark fails."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_naive as bench
from benchmarks.bench_naive import BATCHED, CAREFUL, NAIVE, NaiveCase
from benchmarks.harness.case import Wrong

TINY = NaiveCase(L=13, P=13, N=3, T=4, layers=2, D=64, I=192, H=1, G=1, V=300)


@pytest.fixture(autouse=True)
def no_gradients_and_random_state_restored():
    with torch.random.fork_rng(), torch.no_grad():
        yield


@pytest.mark.parametrize("positions", [13, 5])
def test_all_methods_give_the_same_thoughts(positions):
    case = replace(TINY, P=positions)
    methods = {name: bench.make_method(case, name) for name in (BATCHED, NAIVE, CAREFUL)}
    _, taken_in_turns = bench.take_turns(methods, case.anchors, rounds=3)
    batched = methods[BATCHED](case.anchors)
    assert batched.shape == (positions, 3, 4)
    assert len(batched.unique()) > 20
    for thoughts in taken_in_turns.values():
        assert torch.equal(thoughts, batched)


def test_all_methods_are_timed_after_a_warm_up(conditions, monkeypatch):
    """The batched one after two calls at its whole size, of which the first is apart; the naive ones after some positions."""
    calls, real = [], bench.make_method

    def watched(case, name, dtype=torch.float32):
        method = real(case, name, dtype)
        return lambda anchors: calls.append((name, len(anchors))) or method(anchors)

    monkeypatch.setattr(bench, "make_method", watched)
    candidates = [replace(x, prepare=lambda case, name=x.name: watched(case, name)) for x in (bench.OURS, *bench.BASELINES)]
    began = []
    monkeypatch.setattr(bench, "take_turns", lambda *args, real=bench.take_turns: began.append(len(calls)) or real(*args))
    rows = bench.compare(TINY, candidates[0], candidates[1:], conditions)
    before = calls[: began[0]]
    assert before[-2:] == [(BATCHED, 13)] * 2 and {name for name, _ in before} == {BATCHED, NAIVE, CAREFUL}
    assert rows[0].note.startswith("the first call ") and rows[0].note.endswith("s") and rows[1].note == ""


def test_thoughts_that_differ_fail(monkeypatch):
    anchors = torch.arange(13)
    thoughts = {name: torch.zeros(13, 3, 4) for name in (NAIVE, BATCHED)}
    thoughts[NAIVE][7, 1, 2] = 1
    assert bench.check(TINY, anchors, thoughts) == {NAIVE: 1, BATCHED: 0}  # the same in fp64, so this is rounding
    number = {NAIVE: 0, BATCHED: 1}
    monkeypatch.setattr(bench, "make_method", lambda case, name, dtype: lambda anchors: torch.full((1, 3, 4), number[name]))
    with pytest.raises(Wrong, match="naive: 1 of 39 thoughts differ"):
        bench.check(TINY, anchors, thoughts)
