"""Branches with one text in common, forward and backward: completions of a prompt, and the blocks of a drafter.

Against copies of the prompt, which is what most people train with, FlexAttention, PrefixGrouper, and a dense mask. Copies are
ready-made: making them is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.baselines.branches import BASELINES, BranchCase, sizes
from benchmarks.baselines.packed import Attention
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate, in_gluon
from quietstar_kernels import thought_attention


def ours(case: BranchCase) -> Attention:
    layout, query_rows = case.layout, "thoughts" if case.skipped else "all"
    return lambda q, k, v: thought_attention(q, k, v, layout, query_rows=query_rows)


def cases(device: torch.device, full: bool) -> Iterator[BranchCase]:
    """The most important cases first; the same in a full run."""
    gpu = device.type == "cuda"
    heads = {"H": 32, "G": 8, "K": 128, "dtype": torch.bfloat16} if gpu else {}
    return (BranchCase(device=device, **(size | heads)) for size in sizes())


def smoke(device: torch.device) -> list[BranchCase]:
    """The smallest cases that run every candidate."""
    small = {"L": 16, "S": 4, "H": 2, "G": 1, "K": 16, "device": device}
    kinds = [{"C": 3}, {"grid": "prompts", "L": 4, "C": 2}, {"grid": "drafter", "C": 4}]
    return [BranchCase(**(small | kind), what=what) for kind in kinds for what in ("forward", "forward+backward")]


OURS = Candidate("thought_attention", ours, package=PACKAGE)
BENCHMARK = Benchmark(BranchCase.op, OURS, lambda case: [in_gluon(ours), *BASELINES], cases, smoke)
