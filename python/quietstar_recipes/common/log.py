"""Progress lines of a running recipe, in Python's log "quietstar"; the commands show that log on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar.run.metrics import Line, Metrics, Pace
from quietstar_recipes.tasks import Row

LOG = logging.getLogger("quietstar")
FORMATS = {  # the figures worth following during a run
    **dict.fromkeys(("round", "step", "stage", "removed", "tried", "kept", "rationalised", "failed"), ","),
    **dict.fromkeys(("loss", "reward", "accuracy", "accuracy_first", "accuracy_second"), ".3f"),
}


def log_figures(run: str | Path, figures: Mapping[str, Any]) -> None:
    """Log a line with the figures of the run that are in ``FORMATS``."""
    shown = (f"{name.replace('_', ' ')} {figures[name]:{form}}" for name, form in FORMATS.items() if name in figures)
    LOG.info("%s: %s", run, ", ".join(shown))


def batches_of_round(
    rows: Sequence[Row], config: Any, number: int, kept: Callable[[], int]
) -> Iterator[tuple[int, Sequence[Row]]]:
    """The place of each batch's first row, and the batch; now and then the log says how many rows were tried and kept."""
    pace = Pace()
    for start in range(0, len(rows), config.batch_size):
        if pace.due():
            log_figures(config.out, {"round": number, "tried": start, "kept": kept()})
        yield start, rows[start : start + config.batch_size]


class LoggedMetrics(Metrics):
    """A metrics file whose lines are also logged, at most one every ``SECONDS`` seconds."""

    def __init__(self, path: Path, done: int, kind: type[Line] = Line):
        super().__init__(path, done, write=True, kind=kind)
        self._pace = Pace()

    def add(self, line: dict[str, Any]) -> None:
        super().add(line)
        if self._pace.due():
            log_figures(self.path.parent, line)
