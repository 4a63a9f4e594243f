"""What a run of ``make gpu`` has not measured. A page that shows only what was measured would hide it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.report import tables, units
from benchmarks.report.results_file import is_open

UNFINISHED = "started, not finished"
NO_TIME = "not run: no time was left"


def missing(results: dict[str, Any]) -> list[str]:
    """Stages, cases and candidates without a result, by name, one sentence per kind."""
    lines = results["stages"]
    names = [line["stage"].partition(",")[0] for line in lines]
    late = [line["stage"] for line in lines if line["note"] == NO_TIME]
    stopped = [line["stage"] for line in lines if line["passed"] is None and _was_stopped(line["note"])]
    open_cases: dict[str, list[str]] = defaultdict(list)  # by case, what of it; all of it where ours is open
    without: dict[tuple[str, str, str], int] = defaultdict(int)
    for row in results["rows"]:
        case = f"{row['op']} {tables.case_of(row)}"
        if is_open(row):
            open_cases[case].append("" if row["is_ours"] else row["candidate"])
        elif row["seconds"] is None:
            without[row["op"], row["candidate"], row["note"]] += 1
    found = {
        "Not run": [*(name for name in results.get("plan", ()) if name not in names), *late],
        "Stopped": stopped,
        "Cases not reached": [case if "" in late else f"{case}: {', '.join(late)}" for case, late in open_cases.items()],
        "Without a time": [f"{op}, {name}, {units.count(size, 'case')}: {note}" for (op, name, note), size in without.items()],
    }
    return [f"{what}: {'; '.join(items)}." for what, items in found.items() if items]


def _was_stopped(note: str) -> bool:
    return note == UNFINISHED or "stopped at" in note
