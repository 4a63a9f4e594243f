"""Chunks of anchors have the results of all anchors at once. If they don't, the benchmark fails."""

import pytest
import torch

from benchmarks import bench_memory as bench
from benchmarks.harness.case import Wrong
from benchmarks.harness.peer import Peer


@pytest.fixture
def case(device):
    (case,) = bench.smoke(device)
    return case


def test_a_row_for_each_candidate(case, rates, effort):
    rows = bench.compare(case, bench.OURS, bench.candidates(case), rates, effort)
    assert [row.candidate for row in rows] == ["anchors in chunks of C", "all anchors at once"]
    assert rows[0].sizes["P"] == 3 and rows[0].sizes["C"] == 2 and all(row.seconds > 0 for row in rows)


def test_other_gradients_fail(case, rates, effort):
    def prepare(case):
        step = bench.make_step(case, None)

        def other(input_ids):
            loss, gradients = step(input_ids)
            return loss, gradients * torch.linspace(1, 1.01, len(gradients))

        return other

    with pytest.raises(Wrong, match="moved: gradient differs"):
        bench.compare(case, bench.OURS, [Peer("moved", prepare)], rates, effort)


def test_long_texts_come_first_and_one_has_chunks_of_several_sizes(device):
    first, *others = bench.cases(device, full=False)
    assert first.L == 32768 and first.grid == "headline" and bench.candidates(first)
    cut = [case for case in others if case.grid == "chunk"]
    assert len({case.C for case in cut}) == len(cut) > 1 and not any(map(bench.candidates, cut))
