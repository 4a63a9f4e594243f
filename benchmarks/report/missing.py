"""What a run of ``make gpu`` has not measured. A page that shows only what was measured would hide it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.report import goals, units
from benchmarks.report.results_file import is_open

# The most useful first.
STAGES = ("check", "build", "tests", "attention", "decode", "head", "step", "naive", "others", "sanitize")
UNFINISHED = "started, not finished"


def missing(results: dict[str, Any]) -> list[str]:
    """Stages, goals, cases and candidates without a result, one sentence per kind."""
    lines, rows = results["stages"], results["rows"]
    names = [line["stage"].partition(",")[0] for line in lines]
    stopped = [line["stage"] for line in lines if line["passed"] is None and _was_stopped(line["note"])]
    open_cases: dict[str, int] = defaultdict(int)
    without: dict[tuple[str, str, str], int] = defaultdict(int)
    for row in rows:
        if is_open(row):
            open_cases[row["op"]] += 1
        elif row["seconds"] is None:
            without[row["op"], row["candidate"], row["note"]] += 1
    kind = results["machine"]["kind"]
    found = {
        "Stages not run": [name for name in STAGES if name not in names],
        "Stopped": stopped,
        "Goals not measured": [goal.what for goal in goals.of(kind) if goal.verdict(rows)[2] == "not measured"],
        "Cases not reached": [f"{op} {size}" for op, size in open_cases.items()],
        "Without a time": [f"{op}, {name}, {units.count(size, 'case')}: {note}" for (op, name, note), size in without.items()],
    }
    return [f"{what}: {'; '.join(items)}." for what, items in found.items() if items]


def _was_stopped(note: str) -> bool:
    return note == UNFINISHED or "stopped at" in note
