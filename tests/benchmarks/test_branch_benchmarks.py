"""The benchmarks of branches and of trees: what their cases count, and that the baselines compute the same."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_branches, bench_trees
from benchmarks.baselines import trees
from benchmarks.baselines.branches import BranchCase, Repeated
from benchmarks.baselines.trees import TreeCase
from benchmarks.harness.case import Wrong

CPU = torch.device("cpu")
BENCHMARKS = [bench_branches.BENCHMARK, bench_trees.BENCHMARK]
CASES = {f"{case.op} {case.grid}": replace(case, what="forward") for bench in BENCHMARKS for case in bench.smoke(CPU)}
CANDIDATES = {bench.op: [bench.ours, *bench.candidates(None)] for bench in BENCHMARKS}
PAIRS = [
    pytest.param(case, x, id=f"{name}, {x.name}", marks=[pytest.mark.long] * x.compiles)
    for name, case in CASES.items()
    for x in CANDIDATES[case.op]
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sees_and_work_follow_the_layout(case):
    mask = case.layout.dense_mask()[0, case.skipped :]
    row, key = torch.arange(case.rows)[:, None], torch.arange(case.M)
    assert torch.equal(case.sees(row, key), mask) and case.pairs == int(mask.sum())
    assert case.work().flops == 4 * case.H * case.K * case.pairs
    assert case.layout.live().all()
    if isinstance(case, TreeCase):
        assert trees.pairs_of(case.branches) == int(case.branches.dense_mask().sum())


def test_copies_take_more_arithmetic():
    case = BranchCase(L=512, C=8, S=64)
    assert (case.pairs, case.pairs_repeated) == (512 * 513 / 2 + 8 * (512 * 64 + 64 * 65 / 2), 8 * 576 * 577 / 2)


def test_the_trees_are_those_of_the_design():
    headline, chain, large = (TreeCase(**size) for size in trees.sizes()[::2])
    assert [case.rows for case in (headline, chain, large)] == [3072, 3840, 7168]
    assert [len(case.leaves) for case in (headline, chain, large)] == [32, 48, 16]
    lengths = [rows.shape for rows in chain.sequences]
    assert lengths == [(4, 64 * turns) for turns in range(2, 14)]
    for case, share in ((headline, 0.66), (chain, 0.25), (large, 0.68)):
        assert round(case.pairs / trees.pairs_of(case.branches), 2) == pytest.approx(share, abs=0.011)


@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("case, candidate", PAIRS)
def test_right_results_pass_and_wrong_ones_are_refused(case, candidate, what):
    case = replace(case, what=what)
    if reason := candidate.why_not(case):
        pytest.skip(reason)
    function = candidate.prepare(case)
    case.check(function)
    attend = function.attend if isinstance(function, Repeated) else function
    for wrong in (lambda q, k, v: attend(q, k, v.flip(2)), lambda q, k, v: attend(q, k, v) + 0.01 * q):
        with pytest.raises(Wrong):
            case.check(replace(function, attend=wrong) if isinstance(function, Repeated) else wrong)


def test_a_time_has_its_pairs_beside_it(conditions):
    bench = bench_trees.BENCHMARK
    without = [baseline for baseline in trees.BASELINES if not baseline.compiles]
    rows = bench.compare(CASES["trees headline"], bench.ours, without, conditions)
    assert [row.note for row in rows] == ["", "2.00 times the pairs", "2.00 times the pairs", "1.25 times the pairs"]
