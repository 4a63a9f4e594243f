"""A run's metrics file and its way to end politely."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from accelerate import PartialState

from quietstar.files import write_whole

__all__ = ["Metrics", "check_kind", "process_state"]

# What marks a run's folder: of ``quietstar train``, of a recipe that saves between updates, of one that saves between rounds.
MARKS = ("checkpoints", "progress", "recipe.json")


def process_state() -> PartialState:
    """Which of the processes this is. Without accelerators they only find each other where Accelerate is told of the CPU."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=several and not torch.accelerator.is_available())


def check_kind(out: str | Path, own: str) -> None:
    """Raises ValueError where another kind of run than that of the mark ``own`` is in ``out``, whose metrics would be lost."""
    for mark in MARKS:
        if mark != own and (Path(out) / mark).exists():
            raise ValueError(f"{out}: a run of another command is there, with {mark}: take another out")


class Metrics:
    """``metrics.jsonl``, one line a step; a resumed run drops the lines behind its checkpoint."""

    def __init__(self, path: Path, done: int, write: bool):
        self.path, self.write = path, write
        self.lines: list[dict[str, float]] = []
        if done and path.exists():
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    break  # a line that was being written when the run was killed
                if line["step"] <= done:
                    self.lines.append(line)
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: dict[str, float]) -> None:
        self.lines.append(line)
        if self.write:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
