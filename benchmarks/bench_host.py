"""The time a call of an op takes the host: with empty kernels, or on a GPU with real ones of tiny sizes.

If a step has many small calls, as in generation without a CUDA graph, the device waits for the host. ``host/time_calls.py``
measures in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

    def call(self, function: Callable[[], float], inputs: Inputs) -> float:
        return function()


def measured(case: HostCase) -> Callable[[], float]:
    """A function that returns the seconds of a call of the op."""
    return lambda: _all(str(case.device), case.rounds)[case.what]


@cache
def _all(device: str, rounds: int) -> dict[str, float]:
    """Those of all ops, measured in a process of its own. Its exception is not remembered."""
    command = [sys.executable, "-m", "benchmarks.host.time_calls", "--device", device, "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(case: HostCase, ours: Candidate, baselines: Sequence[Candidate], conditions: Conditions) -> list[Row]:
    row = blank(case, ours, is_ours=True)
    row.seconds, row.rounds, row.times_ours = case.call(ours.prepare(case), {}), case.rounds, 1.0
    return [row]


OURS = Candidate("a call", measured, package=PACKAGE)


def cases(device: torch.device, full: bool) -> Iterator[HostCase]:
    for what in OPS:
        yield HostCase(what=what, grid="headline", device=device, rounds=2000 if full else 200)


def smoke(device: torch.device) -> list[HostCase]:
    return [HostCase(what="decode", device=device, rounds=2)]


BENCHMARK = Benchmark(HostCase.op, OURS, lambda case: [], cases, smoke, compare)
