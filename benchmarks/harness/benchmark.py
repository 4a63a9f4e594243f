"""What a bench_<op>.py offers to the command that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.candidate import Candidate
from benchmarks.harness.case import Case
from benchmarks.harness.compare import Row


@dataclass
class Benchmark:
    """The cases of one op and the candidates for each.

    Attributes:
        op: the op's name. The file is called bench_<op>.py.
        ours: our candidate.
        candidates: the baselines that a case compares ours with.
        cases: the grid for a device, the most important cases first. The flag asks for the full grid.
        smoke: the smallest cases that run every candidate.
        compare: checks and times the candidates of a case, in place of ``harness.compare.compare``, with its arguments.
    """

    op: str
    ours: Candidate
    candidates: Callable[[Any], list[Candidate]]
    cases: Callable[[torch.device, bool], Iterable[Case]]
    smoke: Callable[[torch.device], list]
    compare: Callable[..., list[Row]] | None = None
