"""The time a call of an op takes the host, and what takes it: with empty kernels, or on a GPU with real ones of tiny sizes.

If a step has many small calls, as in generation without a CUDA graph, the device waits for the host. ``host/time_calls.py``
measures in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate
from benchmarks.harness.case import Case, Inputs, Work
from benchmarks.harness.compare import Conditions, Row, blank

ROOT = Path(__file__).parents[1]
OPS = ("attention forward+backward", "decode", "sample_token", "attention forward")
PARTS = {
    "launches": "of which: launches",
    "preparation": "of which: preparing launches",
    "rest": "of which: checks, operator, autograd",
}


@dataclass(frozen=True, kw_only=True)
class HostCase(Case):
    """Calls of one op, whose sizes don't matter.

    Attributes:
        rounds: how many to run; the fastest counts.
    """

    op: ClassVar[str] = "host"
    rotates: ClassVar[bool] = False
    rounds: int = 400
    dtype: torch.dtype = torch.bfloat16

    def work(self) -> Work:
        return Work()

    def inputs(self, seed: int) -> Inputs:
        return {}

    def call(self, function: Callable[[], dict[str, float]], inputs: Inputs) -> dict[str, float]:
        return function()


def measured(case: HostCase) -> Callable[[], dict[str, float]]:
    """A function that returns the seconds of each part of the op's call."""
    return lambda: _all(str(case.device), case.rounds)[case.what]


@cache
def _all(device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Those of all ops, measured in a process of its own. Its exception is not remembered."""
    command = [sys.executable, "-m", "benchmarks.host.time_calls", "--device", device, "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def compare(case: HostCase, ours: Candidate, baselines: Sequence[Candidate], conditions: Conditions) -> list[Row]:
    """A row for the call and one for each part of it."""
    seconds = case.call(ours.prepare(case), {})
    whole = blank(case, ours, is_ours=True)
    whole.rounds, whole.seconds, whole.times_ours = case.rounds, seconds["call"], 1.0
    parts = [
        replace(whole, candidate=PARTS[part], is_ours=False, is_partial=True, seconds=seconds[part], times_ours=None)
        for part in PARTS
    ]
    return [whole, *parts]


OURS = Candidate("a call", measured, package=PACKAGE)


def cases(device: torch.device, full: bool) -> Iterator[HostCase]:
    for what in OPS:
        yield HostCase(what=what, grid="headline", device=device, rounds=2000 if full else 200)


def smoke(device: torch.device) -> list[HostCase]:
    return [HostCase(what="decode", device=device, rounds=2)]


BENCHMARK = Benchmark(HostCase.op, OURS, lambda case: [], cases, smoke, compare)
