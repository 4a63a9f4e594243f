"""Checks the candidates of a case, times them in turn, and makes a row for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness.candidate import Candidate
from benchmarks.harness.case import Case, Inputs, Wrong
from benchmarks.harness.clock import Run, Timing, measure
from benchmarks.harness.machine import name_of
from benchmarks.harness.memory import cache_size, free_memory, peak_memory

MOST_INPUT_SETS = 8
# How the note of a candidate begins that should have run here.
FAILED = NOT_TRIED, REFUSED, BROKEN = "not tried", "refused", "failed"


class Gone(SystemExit):
    """A candidate took the device down; the process ends."""


@dataclass(frozen=True)
class Effort:
    """How long a comparison may take.

    Attributes:
        rounds: timed rounds.
        budget: seconds after which a candidate skips the remaining rounds.
        longest: seconds; a candidate whose run takes longer isn't tried.
    """

    rounds: int = 7
    budget: float = 3.0
    longest: float = 6.0


QUICK, FULL = Effort(), Effort(rounds=15, budget=15.0, longest=20.0)
SMOKE = Effort(rounds=1, budget=0.0)


@dataclass
class Row:
    """One candidate of one case. Times are in seconds, memory in bytes, rates per second; None if not measured.

    Attributes:
        seconds, low, high: median, lowest and highest of the rounds.
        times_ours: its time divided by ours in the same run.
        flops_rate, bytes_rate: useful work divided by the median.
        roofline: seconds that the useful work takes at the machine's measured peak rates.
        bound_by: the peak rate that determines the roofline, "matmul" (of arithmetic) or "copy".
        of_roofline: roofline divided by median, 1 at best.
        note: why there is no number, or a remark about it.
    """

    op: str
    grid: str
    what: str
    dtype: str
    sizes: dict[str, int]
    candidate: str
    version: str
    is_ours: bool = False
    is_partial: bool = False
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    times_ours: float | None = None
    flops_rate: float | None = None
    bytes_rate: float | None = None
    roofline: float | None = None
    bound_by: str = ""
    of_roofline: float | None = None
    peak_bytes: int | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the case and the candidate."""
        return self.op, self.grid, self.what, self.dtype, str(self.sizes), self.candidate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def nowhere(rows: list[Row]) -> None:
    """Writes nothing."""


@dataclass(frozen=True)
class Conditions:
    """What all comparisons of a run have in common.

    Attributes:
        rates: from ``machine.ceilings``.
        write: is called with a case's rows so far.
    """

    rates: dict[str, float]
    effort: Effort
    write: Callable[[list[Row]], None] = nowhere


def compare(case: Case, ours: Candidate, baselines: Sequence[Candidate], conditions: Conditions) -> list[Row]:
    """Check ``ours``, then check each baseline and time it in turn with ours. Each has a row, whether or not it could be timed.

    On a GPU ours is timed alone first, since a baseline may take the device down, or the time be up.

    Raises:
        Gone: a candidate took the device down.
    """
    mine = blank(case, ours, is_ours=True)
    rows, rounds, effort = [mine], Timing(), conditions.effort
    try:
        my_function = _checked(case, ours, mine, conditions)
        sets = input_sets(case)
        my_runs = _runs(case, ours, my_function, sets, mine)
        if my_runs and (case.device.type == "cuda" or not baselines):
            alone = effort.rounds if not baselines else 1
            _fill(mine, case, conditions.rates, measure({"ours": my_runs}, case.device, alone, effort.budget)["ours"])
            mine.times_ours = 1.0
            conditions.write(rows)
        for baseline in baselines:
            row = blank(case, baseline)
            rows.append(row)
            runs = _runs(case, baseline, _checked(case, baseline, row, conditions), sets, row)
            if not runs:
                continue
            try:
                both = {"its": runs} | ({"ours": my_runs} if my_runs else {})
                timings = measure(both, case.device, effort.rounds, effort.budget)
            except Exception as error:
                _failed(row, error, case)
                continue
            _fill(row, case, conditions.rates, timings["its"])
            if again := timings.get("ours"):
                row.times_ours = timings["its"].median / again.median
                rounds = Timing(rounds.seconds + again.seconds, again.graph)
                _fill(mine, case, conditions.rates, rounds)
                mine.times_ours = 1.0
            conditions.write(rows)
        if my_runs and not mine.seconds:  # no baseline could be timed
            _fill(mine, case, conditions.rates, measure({"ours": my_runs}, case.device, effort.rounds, effort.budget)["ours"])
            mine.times_ours = 1.0
    except Gone:
        conditions.write(rows)
        raise
    return rows


def _checked(case: Case, candidate: Candidate, row: Row, conditions: Conditions) -> Callable[..., Any] | None:
    """The candidate's prepared and checked function, or None with the reason in its row."""
    try:
        if reason := candidate.why_not(case) or _too_much(candidate, case, conditions):
            row.note = reason
            return None
        with candidate.switch():
            function = candidate.prepare(case)
            case.check(function)
        return function
    except Exception as error:  # whatever a candidate raises is reported in its row
        _failed(row, error, case)
        return None


def _runs(case: Case, candidate: Candidate, function: Callable[..., Any] | None, sets: Sequence[Inputs], row: Row) -> list[Run]:
    """A run for each set of inputs, with the peak memory of one in the row. Empty without a function, or without room."""
    if function is None:
        return []

    def run(inputs: Inputs) -> Any:
        with candidate.switch():
            return case.call(function, inputs)

    runs: list[Run] = [partial(run, x) for x in sets]
    try:
        row.peak_bytes = peak_memory(runs[0], case.device)
    except RuntimeError as error:  # there was room for the check, but not for all sets of inputs
        _failed(row, error, case)
        return []
    return runs


def _failed(row: Row, error: Exception, case: Case) -> None:
    row.note = as_note(error)
    check_device(case.device, error)


def check_device(device: torch.device, error: Exception) -> None:
    """Raises Gone if a GPU doesn't answer after an error: then all that follows in this process would fail."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as late:
            raise Gone(f"the device is gone: {as_note(error)}") from late


def _fill(row: Row, case: Case, rates: dict[str, float], timing: Timing) -> None:
    fill(row, case, rates, timing.median)
    row.low, row.high, row.rounds = timing.low, timing.high, len(timing.seconds)
    row.note = "timed without a CUDA graph" if case.device.type == "cuda" and _is_short(timing) else ""


def blank(case: Case, candidate: Candidate, note: str = "", is_ours: bool = False) -> Row:
    """A row without numbers."""
    about = {"op": case.op, "grid": case.grid, "what": case.what, "dtype": name_of(case.dtype), "sizes": case.sizes}
    about |= {"candidate": candidate.name, "version": candidate.version, "is_partial": candidate.is_partial}
    return Row(**about, note=note, is_ours=is_ours)


def fill(row: Row, case: Case, rates: dict[str, float], seconds: float) -> None:
    """Fill in the time, and the numbers of the row that follow from it."""
    work = case.work()
    row.seconds = seconds
    row.flops_rate, row.bytes_rate = work.flops / seconds, work.bytes / seconds
    row.roofline, row.bound_by = bound(work.flops, work.bytes, row.dtype, rates)
    row.of_roofline = row.roofline / seconds


def bound(flops: float, size: float, dtype: str, rates: dict[str, float]) -> tuple[float, str]:
    """Seconds that work takes at the peak rates, and which of them decides, "matmul" or "copy"."""
    return max((flops / rates[dtype], "matmul"), (size / rates["copy"], "copy"))


def run_once(case: Case, function: Callable[..., Any], inputs: Inputs) -> tuple[Any, float, int | None]:
    """What a single run returns, its seconds, and its peak memory in bytes."""
    found: list[Any] = []
    began = time.perf_counter()
    peak = peak_memory(lambda: found.append(case.call(function, inputs)), case.device)
    return found[0], time.perf_counter() - began, peak


def input_sets(case: Case) -> list[Inputs]:
    """If the case's inputs rotate, as many sets as are three times as large as the cache."""
    first = case.inputs(seed=1)
    if not case.rotates:
        return [first]
    size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
    wanted = min(MOST_INPUT_SETS, math.ceil(3 * cache_size(case.device) / max(size, 1)))
    return [first, *(case.inputs(seed=i) for i in range(2, wanted + 1))]


def _too_much(candidate: Candidate, case: Case, conditions: Conditions) -> str | None:
    needs, free = candidate.needs(case), free_memory(case.device)
    if needs.bytes > 0.8 * free:
        return f"{NOT_TRIED}: it needs {needs.bytes / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free"
    seconds = needs.flops / conditions.rates[name_of(case.dtype)]
    if seconds > conditions.effort.longest:
        return f"{NOT_TRIED}: a run takes at least {seconds:.2g} s"
    return None


def _is_short(timing: Timing) -> bool:
    return timing.median < 1e-3 and not timing.graph


def as_note(error: Exception) -> str:
    """An exception as a note in a table."""
    if isinstance(error, Wrong):
        return f"{REFUSED}, a wrong result: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{BROKEN}: out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{BROKEN}: {type(error).__name__}: {lines[0][:120]}"
