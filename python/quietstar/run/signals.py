"""Stopping a run in an orderly way after a signal."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from quietstar.run.processes import process_state

__all__ = ["Interrupted", "Signals"]

STOPS = "{name}: stopping after this step, and saving"
ASKS = "still in this step; another Ctrl-C ends the run at once, and loses the steps since the last save"


class Interrupted(Exception):
    """A signal stopped the run after its last step was saved in ``checkpoint``."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"stopped by a signal after step {step}; resume from {checkpoint}")
        self.checkpoint = checkpoint


class Signals:
    """Remembers SIGTERM and Ctrl-C until the step is done, and says so on stderr.

    A second Ctrl-C says what a third one would lose, which raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.caught = False
        self._presses = 0
        self._speaks = process_state().is_main_process  # Ctrl-C goes to all processes of a run
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._catch)
            except ValueError:  # only the main thread may handle signals
                break
        return self

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = True
        self._presses += number == signal.SIGINT
        if self._presses > 2:
            raise KeyboardInterrupt
        again = self._presses == 2 and number == signal.SIGINT
        self._say(ASKS if again else STOPS.format(name="Ctrl-C" if number == signal.SIGINT else "SIGTERM"))

    def _say(self, text: str) -> None:
        """Written past ``sys.stderr``, which the signal may have found in the middle of a write and can't be entered twice."""
        if self._speaks:
            with suppress(OSError):
                os.write(2, f"\n{text}\n".encode())  # below the bar, which then begins a new line

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
