"""The benchmarks' clock, for CPUs and GPUs. Candidates take turns, so that a busy machine slows all of them alike.

    timings = measure({"ours": [lambda: f(x)], "theirs": [lambda: g(x)]}, torch.device("cpu"))
    timings["ours"].median, timings["ours"].low, timings["ours"].high    # seconds

A candidate is a list of functions that do the same work on different tensors. They are called one after the other, since a
single set of tensors would stay in the cache, unlike in a training step.

On a GPU, device events mark the start and end of a round. A run shorter than a millisecond is first captured in a CUDA
graph and then replayed, so that its time is not that of the launches.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]

ROUND = 0.02  # seconds a round takes at least; a shorter run is repeated
GRAPH_BELOW = 1e-3  # seconds; a GPU replays shorter runs as a graph
MOST_CALLS = 1000  # in a round


@dataclass
class Timing:
    """Seconds per run of a candidate, one number for each round.

    Attributes:
        graph: whether the runs were replays of a CUDA graph.
    """

    seconds: list[float] = field(default_factory=list)
    graph: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)


def measure(
    candidates: dict[str, Sequence[Run]], device: torch.device, rounds: int = 7, budget: float = 10.0, graph: bool | None = None
) -> dict[str, Timing]:
    """Warm up every candidate, then run ``rounds`` rounds of each in turn.

    A candidate that has used up ``budget`` seconds skips the remaining rounds. Each has at least one.

    Args:
        graph: whether a GPU replays a CUDA graph; by default that of a short run.
    """
    gpu = device.type == "cuda"
    clocks = {name: _GPUClock(runs, graph) if gpu else _CPUClock(runs) for name, runs in candidates.items()}
    for _ in range(rounds):
        for clock in clocks.values():
            done = len(clock.timing.seconds)
            if not done or (done < rounds and clock.spent < budget):
                clock.round()
    return {name: clock.timing for name, clock in clocks.items()}


class _CPUClock:
    """Warms up with one call, whose time determines the number of calls in a round."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = itertools.cycle(runs)
        self.timing = Timing()
        start = time.perf_counter()
        next(self.runs)()
        self.spent = time.perf_counter() - start
        self.calls = _calls(self.spent)

    def round(self) -> None:
        start = time.perf_counter()
        for _ in range(self.calls):
            next(self.runs)()
        took = time.perf_counter() - start
        self.spent += took
        self.timing.seconds.append(took / self.calls)


class _GPUClock:
    """Warms up with a pass over all inputs, times another one, and captures a graph if a run is short or ``graph`` says so.

    A pass that fills a round is the first one.
    """

    def __init__(self, runs: Sequence[Run], graph: bool | None = None):
        self.runs = list(runs)
        self.timing = Timing()
        self.work, self.passes = self._one_pass, 1
        self._one_pass()
        self.spent = self._seconds()
        if graph is None:
            graph = self.spent / len(self.runs) < GRAPH_BELOW
        if graph:
            self.work = self._captured() or self._one_pass
            self.timing.graph = self.work != self._one_pass
            self.work()
            self.passes = 10
            self.spent = self._seconds()
        elif self.spent >= ROUND:
            self.timing.seconds.append(self.spent / len(self.runs))
        each = self.spent / self.passes / len(self.runs)
        self.passes = max(1, _calls(each) // len(self.runs))

    def round(self) -> None:
        took = self._seconds()
        self.spent += took
        self.timing.seconds.append(took / self.passes / len(self.runs))

    def _one_pass(self) -> None:
        for run in self.runs:
            run()

    def _captured(self) -> Run | None:
        """The replay of one pass, or None if it can't be captured because the candidate waits for the device."""
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._one_pass()
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                self._one_pass()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph.replay

    def _seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.passes):
            self.work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _calls(seconds: float) -> int:
    return min(MOST_CALLS, max(1, math.ceil(ROUND / max(seconds, 1e-9))))
