"""Thresholds of the experiments. A threshold is met if the mean over the seeds meets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

Check = dict[str, Any]


def least(what: str, values: Sequence[float | None], bound: float) -> Check:
    """``what`` should be ``bound`` or more. ``values`` has one value per seed."""
    return _check(what, values, f">= {bound:g}", lambda mean: mean >= bound)


def most(what: str, values: Sequence[float | None], bound: float) -> Check:
    """``what`` should be ``bound`` or less. ``values`` has one value per seed."""
    return _check(what, values, f"<= {bound:g}", lambda mean: mean <= bound)


def figure(result: dict[str, Any], run: str, name: str = "accuracy") -> Any:
    """One figure of one row of a result."""
    return next(row[name] for row in result["rows"] if row["run"] == run)


def _check(what: str, values: Sequence[float | None], wanted: str, holds: Callable[[float], bool]) -> Check:
    """The check fails if a seed could not measure the figure, which is then None."""
    numbers = [value for value in values if value is not None]
    mean = fmean(numbers) if numbers else math.nan
    passed = len(numbers) == len(values) and holds(mean)
    return {"what": what, "values": list(values), "value": mean, "wanted": wanted, "passed": passed}
