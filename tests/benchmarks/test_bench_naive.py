"""Batched and naive thoughts are the same thoughts, and the script's JSON says what was measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_naive.py"
SIZES = {"length": 13, "thoughts": 3, "thought_tokens": 4, "vocabulary": 300, "width": 64, "layers": 2}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_naive", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("positions", [0, 5])
def test_all_methods_give_the_same_thoughts(bench, positions: int) -> None:
    sizes = bench.Sizes(**SIZES, positions=positions)
    batched, *others = (bench.prepare(method, sizes)(sizes.anchors()) for method in ("batched", "naive", "careful naive"))
    assert batched.shape == (positions or 13, 3, 4)
    assert len(batched.unique()) > 20
    for thoughts in others:
        assert torch.equal(thoughts, batched)


def test_thoughts_that_differ_fail(bench, monkeypatch) -> None:
    def other(method: str, *_) -> tuple[float, None, torch.Tensor]:
        return 1.0, None, torch.full((13, 3, 4), int(method == "naive"))

    monkeypatch.setattr(bench, "in_own_process", other)
    monkeypatch.setattr(bench, "explained_by_rounding", lambda *_: False)
    with pytest.raises(RuntimeError, match="naive: 39 of 39 thoughts differ"):
        bench.compare(bench.Sizes(**SIZES), repeats=1, threads=2)


def test_json() -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    command = [sys.executable, str(SCRIPT), *flags, "--positions=2", "--repeats=1", "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert [row["method"] for row in report["methods"]] == ["naive", "careful naive", "batched"]
    assert all(row["seconds"] > 0 and row["differ_by_rounding"] == 0 for row in report["methods"])
