"""A run's metrics file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec

from quietstar.files.reading import as_type, json_value, read_utf8
from quietstar.files.writing import write_whole

__all__ = ["Metrics", "TrainingLine"]


class Line(msgspec.Struct):
    """What every line has; the other figures depend on the run."""

    step: Annotated[int, msgspec.Meta(ge=0)]


class TrainingLine(Line):
    """What ``train`` writes in every line, and its summary reads."""

    seconds: float
    loss_ce: float
    reward: float
    weight: float
    thoughts_per_second: float


class Metrics:
    """``metrics.jsonl``, one line per step. A resumed run drops the lines after its checkpoint.

    Args:
        done: steps of the checkpoint that the run continues from; 0 starts a new file.
        write: whether this process writes the file; the others only keep the lines.
        kind: what every line must have.

    Attributes:
        lines: the figures of every step so far.

    Raises:
        ValueError: a whole line is not JSON, or lacks a figure of ``kind``.
    """

    def __init__(self, path: Path, done: int, write: bool, kind: type[Line] = Line):
        self.path, self.write = path, write
        self.lines: list[dict[str, float]] = []
        if done and path.exists():
            *whole, rest = read_utf8(path).split("\n")
            for number, text in enumerate([*whole, *_if_whole(rest)], 1):
                line = json_value(text, f"{path}: line {number}")
                if as_type(kind, line, f"{path}: line {number}").step <= done:
                    self.lines.append(line)
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: dict[str, float]) -> None:
        """Append the figures of a step."""
        self.lines.append(line)
        if self.write:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _if_whole(rest: str) -> list[str]:
    """What follows the last line break: nothing, or half a line from a run that was killed, which is dropped, or a line."""
    try:
        json.loads(rest)
    except ValueError:
        return []
    return [rest]
