"""The benchmark of trees: what its cases count, and that its baselines compute the same."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import trees
from benchmarks.baselines.branches import Repeated
from benchmarks.baselines.trees import BASELINES, TreeCase
from benchmarks.bench_trees import BENCHMARK, smoke
from benchmarks.harness.case import Wrong

CPU = torch.device("cpu")
CASES = {case.grid: replace(case, what="forward") for case in smoke(CPU)}


@pytest.mark.parametrize("grid", CASES)
def test_sees_and_work_follow_the_layout(grid):
    case = CASES[grid]
    mask = case.layout.dense_mask()[0]
    row, key = torch.arange(case.rows)[:, None], torch.arange(case.M)
    assert torch.equal(case.sees(row, key), mask) and case.pairs == int(mask.sum())
    assert case.work().flops == 4 * case.H * case.K * case.pairs
    assert trees.pairs_of(case.branches) == int(case.branches.dense_mask().sum())


def test_the_cases_are_those_of_the_design():
    headline, chain, large = (TreeCase(**size) for size in trees.sizes()[::2])
    assert [case.rows for case in (headline, chain, large)] == [3072, 3840, 7168]
    assert [len(case.leaves) for case in (headline, chain, large)] == [32, 48, 16]
    lengths = [rows.shape for rows in chain.sequences]
    assert lengths == [(4, 64 * turns) for turns in range(2, 14)]
    for case, share in ((headline, 0.66), (chain, 0.25), (large, 0.68)):
        assert round(case.pairs / trees.pairs_of(case.branches), 2) == pytest.approx(share, abs=0.011)


@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", [pytest.param(x.name, marks=[pytest.mark.long] * x.compiles) for x in BASELINES])
@pytest.mark.parametrize("grid", CASES)
def test_baselines_are_right(grid, name, what):
    case, (baseline,) = replace(CASES[grid], what=what), [baseline for baseline in BASELINES if baseline.name == name]
    if reason := baseline.why_not(case):
        pytest.skip(reason)
    function = baseline.prepare(case)
    case.check(function)
    if isinstance(function, Repeated):
        with pytest.raises(Wrong):
            case.check(replace(function, attend=lambda q, k, v: function.attend(q, k, v.flip(2))))


def test_a_time_has_its_pairs_beside_it(conditions):
    without = [baseline for baseline in BASELINES if not baseline.compiles]
    rows = BENCHMARK.compare(CASES["headline"], BENCHMARK.ours, without, conditions)
    assert [row.note for row in rows] == ["", "2.00 times the pairs", "2.00 times the pairs", "1.25 times the pairs"]
