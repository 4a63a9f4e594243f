"""Thresholds of the experiments. A threshold is met if the mean over the seeds meets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from quietstar.evaluation.intervals import student

Check = dict[str, Any]
Results = Sequence[dict[str, Any]]


def least(what: str, values: Sequence[float | None], bound: float) -> Check:
    """``what`` should be ``bound`` or more. ``values`` has one value per seed."""
    return _check(what, values, f">= {bound:g}", lambda mean: mean >= bound)


def most(what: str, values: Sequence[float | None], bound: float) -> Check:
    """``what`` should be ``bound`` or less. ``values`` has one value per seed."""
    return _check(what, values, f"<= {bound:g}", lambda mean: mean <= bound)


def gaps(
    claim: str,
    results: Results,
    run: str,
    controls: Sequence[str],
    bound: float,
    name: str = "accuracy",
    less: bool = False,
    control_name: str = "",
) -> list[Check]:
    """A claim in the page's first table: the figure ``name`` of ``run`` is above each control's by ``bound``.

    The gap is taken seed by seed. With ``less``, the figure should be below the control's; with ``control_name``, the control's
    figure is this other one.
    """
    ours = [figure(result, run, name) for result in results]
    found = []
    for control in controls:
        theirs = [figure(result, control, control_name or name) for result in results]
        pairs = zip(ours, theirs, strict=True)
        values = [None if x is None or y is None else (y - x if less else x - y) for x, y in pairs]
        what = f"{run}, {name.replace('_', ' ')} {'below' if less else 'above'} {control}"
        found.append(
            least(what, values, bound)
            | {"claim": claim, "bound": bound, "ours": ours, "control": control, "theirs": theirs, "less": less}
        )
    return found


def figure(result: dict[str, Any], run: str, name: str = "accuracy") -> Any:
    """One figure of one row of a result."""
    return next(row[name] for row in result["rows"] if row["run"] == run)


def margin(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean over seeds, by Student's t; None for a single seed."""
    seeds = len(values)
    return student(seeds - 1) * stdev(values) / math.sqrt(seeds) if seeds > 1 else None


def _check(what: str, values: Sequence[float | None], wanted: str, holds: Callable[[float], bool]) -> Check:
    """The check fails if a seed could not measure the figure, which is then None."""
    numbers = [value for value in values if value is not None]
    mean = fmean(numbers) if numbers else math.nan
    passed = len(numbers) == len(values) and holds(mean)
    return {"what": what, "values": list(values), "value": mean, "wanted": wanted, "passed": passed}
