"""The benchmark of branches: what its cases count, and that its baselines compute the same."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines.branches import BASELINES, BranchCase
from benchmarks.bench_branches import BENCHMARK, smoke
from benchmarks.harness.case import Wrong

CPU = torch.device("cpu")
CASES = {case.grid: case for case in smoke(CPU) if case.what == "forward"}


@pytest.mark.parametrize("grid", CASES)
def test_sees_and_work_follow_the_layout(grid):
    case = CASES[grid]
    mask = case.layout.dense_mask()[0, case.skipped :]
    row, key = torch.arange(case.rows)[:, None], torch.arange(case.M)
    assert torch.equal(case.sees(row, key), mask) and case.pairs == int(mask.sum())
    assert case.work().flops == 4 * case.H * case.K * case.pairs
    assert case.layout.live().all()


def test_copies_take_more_arithmetic():
    case = BranchCase(L=512, C=8, S=64)
    assert (case.pairs, case.pairs_repeated) == (512 * 513 / 2 + 8 * (512 * 64 + 64 * 65 / 2), 8 * 576 * 577 / 2)


@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", [pytest.param(x.name, marks=[pytest.mark.long] * x.compiles) for x in BASELINES])
@pytest.mark.parametrize("grid", CASES)
def test_baselines_are_right(grid, name, what):
    case, (baseline,) = replace(CASES[grid], what=what), [baseline for baseline in BASELINES if baseline.name == name]
    if reason := baseline.why_not(case):
        pytest.skip(reason)
    case.check(baseline.prepare(case))


@pytest.mark.parametrize("grid", CASES)
def test_a_wrong_result_is_refused(grid):
    case = replace(CASES[grid], what="forward+backward")
    function = BENCHMARK.ours.prepare(case)
    case.check(function)
    for wrong in (lambda q, k, v: function(q, k, v.flip(2)), lambda q, k, v: function(q, k, v) + 0.01 * q):
        with pytest.raises(Wrong):
            case.check(wrong)
