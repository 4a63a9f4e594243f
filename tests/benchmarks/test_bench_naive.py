"""Batched and naive thoughts are the same thoughts, and where they are not, the benchmark fails."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_naive.py"
TINY = ["--length=13", "--thoughts=3", "--thought-tokens=4", "--vocabulary=300", "--width=64", "--layers=2", "--repeats=3"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("bench_naive", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng(), torch.no_grad():
        yield module


@pytest.mark.parametrize("positions", [13, 5])
def test_all_methods_give_the_same_thoughts(bench, positions: int) -> None:
    methods = bench.make_methods(bench.parse(TINY))
    anchors = bench.evenly_spaced(positions, 13)
    _, taken_in_turns = bench.take_turns(methods, anchors, rounds=3)
    batched = methods[bench.BATCHED](anchors)
    assert batched.shape == (positions, 3, 4)
    assert len(batched.unique()) > 20
    for thoughts in taken_in_turns.values():
        assert torch.equal(thoughts, batched)


def test_thoughts_that_differ_fail(bench, monkeypatch) -> None:
    args, anchors = bench.parse(TINY), torch.arange(13)
    thoughts = {name: torch.zeros(13, 3, 4) for name in (bench.NAIVE, bench.BATCHED)}
    thoughts[bench.NAIVE][7, 1, 2] = 1
    assert bench.check(args, anchors, thoughts) == {bench.NAIVE: 1, bench.BATCHED: 0}  # the same in fp64: rounding
    exact = {name: lambda anchors, n=n: torch.full((len(anchors), 3, 4), n) for n, name in enumerate(thoughts)}
    monkeypatch.setattr(bench, "make_methods", lambda *_: exact)
    with pytest.raises(RuntimeError, match="naive: 1 of 39 thoughts differ"):
        bench.check(args, anchors, thoughts)


def test_report(bench, tmp_path, capsys) -> None:
    bench.main([*TINY, "--positions=2", f"--json={tmp_path / 'report.json'}"])
    assert "QUICK LOOK" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [bench.NAIVE, bench.CAREFUL, bench.BATCHED]
    assert all(row["seconds"] > 0 for row in rows)
