"""Claims of the experiments, and what the seeds say about them.

A claim compares one run with each of its controls, seed by seed: method and control start from the same model and see the
same problems. It "holds" if the gap's 95 % interval over the seeds is above 0 for every control, it is "no" if one is below 0,
and it is "not resolved" otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from quietstar.evaluation.intervals import student

HOLDS, OPEN, NO = "holds", "not resolved", "no"
Results = Sequence[dict[str, Any]]  # one for each seed


@dataclass(frozen=True)
class Claim:
    """That a run's ``figure`` is above that of each control, or with ``less`` below it; without controls, above or below 0.

    A control is a run, or a run and another figure of it.
    """

    text: str
    run: str
    controls: Sequence[str | tuple[str, str]] = ()
    figure: str = "accuracy"
    less: bool = False


@dataclass(frozen=True)
class Gap:
    """By how much a claim is true, against one control: for each seed its own figure, the control's, and the gap."""

    control: str
    ours: list[float | None]
    theirs: list[float | None]
    values: list[float | None]

    @property
    def state(self) -> str:
        """``HOLDS``, ``OPEN`` or ``NO``; open where a seed could not measure it, and with a single seed."""
        numbers = [value for value in self.values if value is not None]
        half = margin(numbers)
        if half is None or len(numbers) < len(self.values) or abs(fmean(numbers)) <= half:
            return OPEN
        return HOLDS if fmean(numbers) > 0 else NO


def hardest(claim: Claim, results: Results) -> Gap:
    """The gap to the control that speaks most against the claim: by its state, then by its mean."""
    ours = [figure(result, claim.run, claim.figure) for result in results]
    sign = -1 if claim.less else 1
    found = []
    for control in claim.controls or [""]:
        run, name = (control, claim.figure) if isinstance(control, str) else control
        theirs = [figure(x, run, name) if run else 0.0 for x in results]
        gaps = [None if x is None or y is None else sign * (x - y) for x, y in zip(ours, theirs, strict=True)]
        found.append(Gap(run if name == claim.figure else f"{run}, {name.replace('_', ' ')}", ours, theirs, gaps))
    return min(found, key=lambda gap: ([NO, OPEN, HOLDS].index(gap.state), mean(gap.values)))


def figure(result: dict[str, Any], run: str, name: str = "accuracy") -> Any:
    """One figure of one row of a result."""
    return next(row[name] for row in result["rows"] if row["run"] == run)


def mean(values: Sequence[float | None]) -> float:
    """Of the seeds that could measure it; -inf if none could."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else -math.inf


def margin(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean over seeds, by Student's t; None for a single seed."""
    seeds = len(values)
    return student(seeds - 1) * stdev(values) / math.sqrt(seeds) if seeds > 1 else None
