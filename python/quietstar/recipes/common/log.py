"""What a recipe tells of a run while it goes on, to Python's log "quietstar"; the commands show that log on the terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quietstar.run.metrics import Metrics

LOG = logging.getLogger("quietstar")
SECONDS = 10.0  # between the lines about single updates
FORMS = {  # what a person follows a run by, of all that may be in a line of figures
    **dict.fromkeys(("round", "step", "stage", "removed", "tried", "kept", "rationalised", "failed"), ","),
    **dict.fromkeys(("loss", "reward", "accuracy", "accuracy_first", "accuracy_second"), ".3f"),
}


def tell(run: str | Path, figures: Mapping[str, Any]) -> None:
    """A line of those figures of the run that a person follows it by."""
    shown = (f"{name.replace('_', ' ')} {figures[name]:{form}}" for name, form in FORMS.items() if name in figures)
    LOG.info("%s: %s", run, ", ".join(shown))


class Pace:
    """Whether it is time for another line."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < SECONDS:
            return False
        self._last = now
        return True


class ToldMetrics(Metrics):
    """A metrics file whose lines are also told, where there is time for it."""

    def __init__(self, path: Path, done: int):
        super().__init__(path, done, write=True)
        self._pace = Pace()

    def add(self, line: dict[str, Any]) -> None:
        super().add(line)
        if self._pace.due():
            tell(self.path.parent, line)


def told() -> bool:
    """Whether anybody reads the log."""
    return LOG.isEnabledFor(logging.INFO)


@contextmanager
def on_terminal() -> Iterator[None]:
    """Inside, the log is on stderr."""
    handler, level = logging.StreamHandler(sys.stderr), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
