"""Runs the candidates of a case against each other and makes their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from case import Case, Inputs, Wrong
from harness import Run, Timing, cache_size, free_memory, measure, peak_memory
from machine import name_of
from peers import Peer

MOST_INPUT_SETS = 8


@dataclass(frozen=True)
class Effort:
    """How long a comparison may take.

    Attributes:
        rounds: timed rounds.
        budget: seconds after which a candidate sits out further rounds.
        longest: seconds of one run from which on a peer isn't tried.
    """

    rounds: int = 7
    budget: float = 3.0
    longest: float = 6.0


QUICK, FULL = Effort(), Effort(rounds=15, budget=15.0, longest=20.0)
SMOKE = Effort(rounds=1, budget=0.0)


@dataclass
class Row:
    """One candidate of one case. Times in seconds, memory in bytes, rates per second; None where nothing was measured.

    Attributes:
        times_ours: its seconds over ours, of the same run.
        flops_rate, bytes_rate: useful work over the median.
        floor: seconds that the useful work takes at the machine's measured ceilings, and bound_by the one that binds.
        of_floor: floor over median, 1 at best.
        note: why there is no number, or what to know about it.
    """

    op: str
    grid: str
    what: str
    dtype: str
    sizes: dict[str, int]
    candidate: str
    version: str
    is_ours: bool = False
    is_floor: bool = False
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    times_ours: float | None = None
    flops_rate: float | None = None
    bytes_rate: float | None = None
    floor: float | None = None
    bound_by: str = ""
    of_floor: float | None = None
    peak_bytes: int | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Of its case and its candidate."""
        return self.op, self.grid, self.what, self.dtype, str(self.sizes), self.candidate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    case: Case,
    ours: Peer,
    peers: Sequence[Peer],
    rates: dict[str, float],
    effort: Effort = QUICK,
    write: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Check ``ours``, then check each peer and time it and ours in turn; one row for each, whatever became of it.

    Args:
        rates: of ``machine.ceilings``.
        write: takes the rows so far, after each peer.
    """
    mine = blank(case, ours)
    mine.is_ours = True
    rows, rounds = [mine], Timing()
    my_function = _checked(case, ours, mine, rates, effort)
    sets = input_sets(case)
    my_runs = _runs(case, my_function, sets, mine)
    for peer in peers:
        row = blank(case, peer)
        rows.append(row)
        runs = _runs(case, _checked(case, peer, row, rates, effort), sets, row)
        if not runs:
            continue
        try:
            timings = measure({"its": runs} | ({"ours": my_runs} if my_runs else {}), case.device, effort.rounds, effort.budget)
        except Exception as error:
            row.note = said(error)
            continue
        _fill(row, case, rates, timings["its"])
        if beside := timings.get("ours"):
            row.times_ours = timings["its"].median / beside.median
            rounds = Timing(rounds.seconds + beside.seconds, beside.graph)
            _fill(mine, case, rates, rounds)
        write(rows)
    if my_runs and not rounds.seconds:
        _fill(mine, case, rates, measure({"ours": my_runs}, case.device, effort.rounds, effort.budget)["ours"])
    if mine.seconds:
        mine.times_ours = 1.0
    return rows


def _checked(case: Case, peer: Peer, row: Row, rates: dict[str, float], effort: Effort) -> Callable[..., Any] | None:
    """What the peer prepared, or None with the reason in its row."""
    reason = peer.why_not(case) or _too_much(peer, case, rates, effort)
    if reason is None:
        try:
            function = peer.prepare(case)
            case.check(function)
            return function
        except Exception as error:  # whatever a peer raises, its row says it
            reason = said(error)
    row.note = reason
    return None


def _runs(case: Case, function: Callable[..., Any] | None, sets: Sequence[Inputs], row: Row) -> list[Run]:
    """A run for every set of inputs; its memory is in the row then. None where there is no function, or no room."""
    if function is None:
        return []
    runs = [lambda x=x: case.call(function, x) for x in sets]
    try:
        row.peak_bytes = peak_memory(runs[0], case.device)
    except RuntimeError as error:  # the check left room for it, all inputs together don't
        row.note = said(error)
        return []
    return runs


def _fill(row: Row, case: Case, rates: dict[str, float], timing: Timing) -> None:
    fill(row, case, rates, timing.median)
    row.low, row.high, row.rounds = timing.low, timing.high, len(timing.seconds)
    row.note = "events, not a graph" if case.device.type == "cuda" and _is_short(timing) else ""


def blank(case: Case, peer: Peer, note: str = "") -> Row:
    """A row without numbers."""
    sizes, dtype = case.sizes, name_of(case.dtype)
    return Row(case.op, case.grid, case.what, dtype, sizes, peer.name, peer.version, is_floor=peer.is_floor, note=note)


def fill(row: Row, case: Case, rates: dict[str, float], seconds: float) -> None:
    """The numbers of a row that follow from its time."""
    work = case.work()
    row.seconds = seconds
    row.flops_rate, row.bytes_rate = work.flops / seconds, work.bytes / seconds
    arithmetic, traffic = work.flops / rates[row.dtype], work.bytes / rates["copy"]
    row.floor, row.bound_by = max((arithmetic, "matmul"), (traffic, "copy"))
    row.of_floor = row.floor / seconds


def input_sets(case: Case) -> list[Inputs]:
    """As many sets of inputs as overflow the cache three times, where they rotate."""
    first = case.inputs(seed=1)
    if not case.rotates:
        return [first]
    size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
    wanted = min(MOST_INPUT_SETS, math.ceil(3 * cache_size(case.device) / max(size, 1)))
    return [first, *(case.inputs(seed=i) for i in range(2, wanted + 1))]


def _too_much(peer: Peer, case: Case, rates: dict[str, float], effort: Effort) -> str | None:
    needs, free = peer.needs(case), free_memory(case.device)
    if needs.bytes > 0.8 * free:
        return f"not tried: it needs {needs.bytes / 2**30:.3g} GiB, {free / 2**30:.3g} are free"
    seconds = needs.flops / rates[name_of(case.dtype)]
    if seconds > effort.longest:
        return f"not tried: a run takes {seconds:.2g} s at best"
    return None


def _is_short(timing: Timing) -> bool:
    return timing.median < 1e-3 and not timing.graph


def said(error: Exception) -> str:
    """An exception in one line of a table."""
    if isinstance(error, Wrong):
        return f"refused, a wrong result: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:120]}"
