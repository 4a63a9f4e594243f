"""Branches on branches, as of several turns, forward and backward.

Against a sequence for each leaf, which is what most people train with, FlexAttention with the tree as its mask, and branches
that repeat what is above them. Such copies are ready-made, the mask is made and FlexAttention compiled before the clock starts.
A note says how many times our pairs of query and key a baseline computes: by arithmetic, it would take as many times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.baselines.packed import Attention
from benchmarks.baselines.trees import BASELINES, TreeCase, sizes, times_the_pairs
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate
from benchmarks.harness.compare import Conditions, Row, compare
from quietstar_kernels import thought_attention


def ours(case: TreeCase) -> Attention:
    layout = case.layout
    return lambda q, k, v: thought_attention(q, k, v, layout)


def cases(device: torch.device, full: bool) -> Iterator[TreeCase]:
    """The most important cases first; the same in a full run."""
    gpu = device.type == "cuda"
    heads = {"H": 32, "G": 8, "K": 128, "dtype": torch.bfloat16} if gpu else {}
    return (TreeCase(device=device, **(size | heads)) for size in sizes())


def smoke(device: torch.device) -> list[TreeCase]:
    """The smallest cases that run every candidate."""
    small = {"C": 3, "F": 2, "S": 4, "H": 2, "G": 1, "K": 16, "device": device}
    kinds = [("headline", 16, "forward"), ("headline", 16, "forward+backward"), ("chain", 4, "forward+backward")]
    return [TreeCase(**small, grid=grid, L=L, what=what) for grid, L, what in kinds]


def with_pairs(case: TreeCase, ours: Candidate, baselines: Sequence[Candidate], conditions: Conditions) -> list[Row]:
    """``compare``, with the pairs that each baseline computes beside its time."""
    rows = compare(case, ours, baselines, conditions)
    for row, baseline in zip(rows[1:], baselines, strict=True):
        if row.seconds is not None:
            row.note = f"{times_the_pairs(case, baseline):.2f} times the pairs"
    return rows


BENCHMARK = Benchmark(
    TreeCase.op, Candidate("thought_attention", ours, package=PACKAGE), lambda case: BASELINES, cases, smoke, with_pairs
)
