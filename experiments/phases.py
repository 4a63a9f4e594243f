"""Experiments in parts, each of which leaves a file and is skipped when that is there, so that a stopped run continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar.files.writing import write_whole


@dataclass(frozen=True)
class Phase:
    """A part of an experiment, done once ``result`` is there."""

    result: Path
    work: Callable[[], dict[str, Any]]

    def run(self, **more: Any) -> None:
        """Do it and keep its result with its seconds and ``more``, unless it is there."""
        if self.result.exists():
            return
        print(f"{self.result}: begun", flush=True)
        began = time.perf_counter()
        found = self.work()
        found |= {"seconds": time.perf_counter() - began, **more}
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.result, json.dumps(found) + "\n")
        print(f"{self.result}: done, {found['seconds'] / 60:.1f} minutes", flush=True)
