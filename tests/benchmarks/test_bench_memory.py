"""Chunks of anchors have the results of all anchors at once. If they don't, the benchmark fails."""

import pytest
import torch

from benchmarks import bench_memory as bench
from benchmarks.harness.candidate import Candidate
from benchmarks.harness.case import Wrong


@pytest.fixture
def case(device):
    (case,) = bench.smoke(device)
    return case


def test_other_gradients_fail(case, conditions):
    def prepare(case):
        step = bench.make_step(case, None)

        def other(input_ids):
            loss, gradients = step(input_ids)
            return loss, gradients * torch.linspace(1, 1.01, len(gradients))

        return other

    with pytest.raises(Wrong, match="moved: gradient differs"):
        bench.compare(case, bench.OURS, [Candidate("moved", prepare)], conditions)
