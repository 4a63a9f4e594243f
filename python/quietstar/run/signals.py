"""Stopping a run in an orderly way after a signal."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

__all__ = ["Interrupted", "Signals"]


class Interrupted(Exception):
    """A signal stopped the run after its last step was saved in ``checkpoint``."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"stopped by a signal after step {step}; resume from {checkpoint}")
        self.checkpoint = checkpoint


class Signals:
    """Remembers SIGTERM and Ctrl-C until the step is done. A second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.caught = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._catch)
            except ValueError:  # only the main thread may handle signals
                break
        return self

    def _catch(self, number: int, frame: Any) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
