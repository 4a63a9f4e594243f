"""The benchmark of branches: what its cases count, and that its baselines compute the same."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.baselines import flashmask
from benchmarks.baselines.branches import BASELINES, BranchCase
from benchmarks.bench_branches import BENCHMARK, smoke
from benchmarks.harness.case import Wrong
from quietstar_kernels import ThoughtLayout

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


LAYOUTS = {
    "every position": ThoughtLayout.every_position(2, 7, 2, 3),
    "prompt": BranchCase(L=9, C=3, S=4).layout,
    "unequal": ThoughtLayout.packed(torch.tensor([[0, 4, 4, 6]]), torch.tensor([[3, 1, 5, 2]]), 8),
    "no branch sees the end": ThoughtLayout.packed(torch.tensor([[2]]), torch.tensor([[3]]), 8),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_flashmask_hides_what_a_branch_does_not_see(name):
    """In the words of its README: a key is masked for rows from the first of two numbers to the second, below the diagonal."""
    layout = LAYOUTS[name]
    first, end = flashmask.hidden_rows(layout).unbind(-1)
    row, key = torch.arange(layout.M)[:, None], torch.arange(layout.M)
    seen = (key <= row) & ~((row >= first) & (row < end))
    assert torch.equal(seen, layout.dense_mask())


@pytest.mark.parametrize(
    "layout, reason",
    [
        (LAYOUTS["unequal"], None),
        (ThoughtLayout.at(torch.tensor([[1, 3]]), 1, 2, text_length=6, own="full"), "more than an interval"),
        (ThoughtLayout.packed(torch.tensor([[4, -1]]), torch.tensor([[2, 0]]), 6), "more than an interval"),
        (CASES["prompts"].layout, "more than an interval"),
    ],
)
def test_flashmask_is_asked_for_no_other_masks(layout, reason, monkeypatch):
    case = SimpleNamespace(device=torch.device("cuda"), layout=layout)
    assert "is not installed here" in flashmask.no_flashmask(case)
    monkeypatch.setattr(flashmask, "find_spec", lambda name: True)
    found = flashmask.no_flashmask(case)
    assert found is None if reason is None else reason in found
