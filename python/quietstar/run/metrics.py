"""A run's metrics file."""

from __future__ import annotations

import json
from pathlib import Path

from quietstar.files.writing import write_whole

__all__ = ["Metrics"]


class Metrics:
    """``metrics.jsonl``, one line per step. A resumed run drops the lines after its checkpoint.

    Args:
        done: steps of the checkpoint that the run continues from; 0 starts a new file.
        write: whether this process writes the file; the others only keep the lines.

    Attributes:
        lines: the figures of every step so far.
    """

    def __init__(self, path: Path, done: int, write: bool):
        self.path, self.write = path, write
        self.lines: list[dict[str, float]] = []
        if done and path.exists():
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    break  # half a line, from a run that was killed while writing it
                if line["step"] <= done:
                    self.lines.append(line)
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: dict[str, float]) -> None:
        """Append the figures of a step."""
        self.lines.append(line)
        if self.write:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
