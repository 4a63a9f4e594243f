"""The benchmarks' clock, for CPUs and GPUs: candidates take turns, so that a busy machine slows all of them alike.

    timings = measure({"ours": [lambda: f(x)], "theirs": [lambda: g(x)]}, torch.device("cpu"))
    timings["ours"].median, timings["ours"].low, timings["ours"].high    # seconds
    peak_memory(lambda: f(x), torch.device("cpu"))                       # bytes

A candidate is a list of functions that do the same work on different tensors. They are called one after the other: one set
of tensors alone would stay in the cache, and the copy from there is not what a training step does.

On a GPU, device events bracket a round; what is shorter than a millisecond is captured in a CUDA graph first and the graph
is replayed, so that launches don't count twice in short operations.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]

ROUND = 0.02  # seconds that a round takes at least: shorter runs are repeated in it
GRAPH_BELOW = 1e-3  # seconds of a run under which a GPU replays a graph
MOST_CALLS = 1000  # in a round


@dataclass
class Timing:
    """Seconds of one run of a candidate, a number for every round.

    Attributes:
        graph: the runs were replays of a CUDA graph.
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
    candidates: dict[str, Sequence[Run]], device: torch.device, rounds: int = 7, budget: float = 10.0
) -> dict[str, Timing]:
    """Warm every candidate up, then run ``rounds`` rounds in turn.

    A candidate that has used ``budget`` seconds sits out the other rounds; every one has at least one.
    """
    clocks = {name: (_GPUClock if device.type == "cuda" else _CPUClock)(runs) for name, runs in candidates.items()}
    for _ in range(rounds):
        for clock in clocks.values():
            if not clock.timing.seconds or clock.spent < budget:
                clock.round()
    return {name: clock.timing for name, clock in clocks.items()}


class _CPUClock:
    """Warms up with one call, which also says how many calls make a round."""

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
    """Warms up with a pass over all inputs, times another, and captures a graph of one where a run is short."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = list(runs)
        self.timing = Timing()
        self.work, self.passes = self._one_pass, 1
        self._one_pass()
        self.spent = self._seconds()
        if self.spent / len(self.runs) < GRAPH_BELOW:
            self.work = self._captured() or self._one_pass
            self.timing.graph = self.work != self._one_pass
            self.work()
            self.passes = 10
            self.spent = self._seconds()
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
        """The replay of one pass; None for a candidate that waits for the device and so can't be captured."""
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


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that ``run`` adds while it runs.

    On a GPU by PyTorch's allocator; on a CPU by the process's resident memory, sampled every millisecond, None without glibc.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    if platform.libc_ver()[0] != "glibc":
        return None
    return _peak_resident(run)


def _peak_resident(run: Run) -> int:
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    ctypes.CDLL(None).malloc_trim(0)  # or memory that earlier calls freed would hide this one's
    start = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()  # held: what it returns counts
        peak = max(peak, resident())
        del result
    finally:
        done.set()
        watcher.join()
    return peak - start


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    kilobytes = next(line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(kilobytes) * 1024


def cache_size(device: torch.device) -> int:
    """Bytes of the last-level cache, which rotating inputs must overflow."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)
