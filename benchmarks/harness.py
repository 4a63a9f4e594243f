"""The benchmarks' timer: candidates take turns on the same inputs, so that a busy machine slows all of them alike.

results = measure({"ours": lambda: f(x), "theirs": lambda: g(x)}, repeats=7)
results["ours"].median, results["ours"].spread
"""

from __future__ import annotations

import argparse
import ctypes
import json
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


@dataclass
class Timing:
    """The seconds of every run of one candidate."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{min(self.seconds) * 1e3:.0f}..{max(self.seconds) * 1e3:.0f}"


def measure(candidates: dict[str, Callable[[], Any]], repeats: int, budget: float = 30.0) -> dict[str, Timing]:
    """Run every candidate once to warm up and then ``repeats`` rounds in turn.

    A candidate that has used ``budget`` seconds sits out the rounds after its third.
    """
    timings = {name: Timing() for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds = timings[name].seconds
            if len(seconds) >= 3 and sum(seconds) > budget:
                continue
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return timings


def peak_memory(run: Callable[[], Any]) -> float | None:
    """Megabytes by which ``run`` raises the process's resident memory, sampled every millisecond; None without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
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
    run()
    done.set()
    watcher.join()
    return (peak - start) / 2**20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every benchmark has."""
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads PyTorch may use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")


def versions() -> str:
    """Everything a number depends on, in one line."""
    return (
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, {_cpu_name()}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Columns are the keys of the first row."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def write_json(path: Path | None, **content: Any) -> None:
    """Write the rows and what they hang on, where a path was given."""
    if path is not None:
        path.write_text(json.dumps({"versions": versions(), **content}, indent=2, default=str) + "\n")
