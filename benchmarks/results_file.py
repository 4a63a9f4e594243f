"""A results file that is written after every case and holds what several runs measured, each its part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RowDict = dict[str, Any]
CASE = ("op", "grid", "what", "dtype", "sizes")
OUT_OF_TIME, NOT_REACHED = "not run: out of time", "not reached"


def load(path: Path) -> dict[str, Any]:
    """A results file: {"machine", "ceilings", "command", "rows"}, and from ``make gpu`` "stages"."""
    return json.loads(path.read_text())


def save(results: dict[str, Any], path: Path) -> None:
    """Whoever kills this process finds the file as it was before or as it is after."""
    write(json.dumps(results, indent=1) + "\n", path)


def write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def is_open(row: RowDict) -> bool:
    """Nobody has tried it yet."""
    return row["note"] in (OUT_OF_TIME, NOT_REACHED)


def merged(old: Iterable[RowDict], new: Iterable[RowDict], ops: Sequence[str]) -> list[RowDict]:
    """``old`` with the row of ``new`` for a case's candidate in place of its own, unless it wasn't tried; ordered by op."""
    cases: dict[str, dict[str, RowDict]] = {}
    for row in (*old, *new):
        candidates = cases.setdefault(str([row[name] for name in CASE]), {})
        before = candidates.get(row["candidate"])
        if before is None or is_open(before) or not is_open(row):
            candidates[row["candidate"]] = row
    rows = [row for candidates in cases.values() for row in candidates.values()]
    return sorted(rows, key=lambda row: ops.index(row["op"]))
