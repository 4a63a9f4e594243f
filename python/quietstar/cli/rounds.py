"""What the commands that run in rounds print at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar.recipes.common.rounds import BEST, best_round

MEASURED = ("valid_accuracy", "accuracy", "low", "high", "tokens", "seconds")  # columns of a round's figures


def saved_rounds(out: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Which round of a recipe is best, and where it is."""
    best = best_round(reports)
    folder, report = Path(out) / f"round-{best:02d}", reports[best]
    link = Path(out) / BEST
    saved = f"{link}, which is {folder.name}" if link.is_symlink() else str(folder)
    return (
        f"best on validation problems: round {best}, which solves {report['accuracy']:.1%} of the test problems\nsaved {saved}"
    )
