"""The results file. It is written after every case, and several runs may each add their part."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.compare import bound
from benchmarks.harness.machine import COPY, ceilings, describe
from benchmarks.report.committed import as_json

RowDict = dict[str, Any]  # a ``harness.compare.Row``, as it is stored
CASE = ("op", "grid", "what", "dtype", "sizes")
OUT_OF_TIME, NOT_REACHED = "not run: out of time", "not reached"
MEASURED = "measured on "
AND = "` and `"  # between the commands of a file that several runs have filled; a page shows them as code
DOUBT = "The copy was timed as a memory copy in a CUDA graph alone and is in doubt, so shares of it may be too high."


def load(path: Path) -> dict[str, Any]:
    """The keys are "machine", "ceilings", "command" and "rows", and after ``make gpu`` also "plan" and "stages"."""
    return json.loads(path.read_text())


def begin(
    path: Path | None, device: torch.device, dtypes: Sequence[torch.dtype], command: str, ceiling_size: int | None = None
) -> dict[str, Any]:
    """Results without new rows. They include what the file already has of this device, under the highest peak rates."""
    machine, rates = describe(device), ceilings(device, dtypes, ceiling_size)
    results: dict[str, Any] = {"machine": machine, "ceilings": rates, "command": command, "rows": []}
    if path and path.exists():
        before = load(path)
        if all(before["machine"].get(name, machine[name]) == machine[name] for name in ("device", "instructions")):
            rates |= {name: max(rate, rates.get(name, 0.0)) for name, rate in before["ceilings"].items()}
            rows = [under(rates, dated(row, before["machine"])) for row in before["rows"]]
            commands = dict.fromkeys([*before["command"].split(AND), command])
            results = before | results | {"ceilings": rates, "rows": rows, "command": AND.join(commands)}
    return results


def save(results: dict[str, Any], path: Path) -> None:
    write(as_json(results), path)


def write(text: str, path: Path) -> None:
    """Replace the file as a whole, so that a kill in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def copy_in_doubt(results: dict[str, Any]) -> bool:
    """Whether a GPU's copy was timed in one way alone, as before there were rates for each."""
    rates = results["ceilings"]
    return results["machine"]["kind"] == "cuda" and "copy" in rates and not any(name.startswith(COPY) for name in rates)


def dated(row: RowDict, machine: dict[str, Any]) -> RowDict:
    """A row of an earlier run, with its date in the note: the file's is that of the last run."""
    if row["seconds"] is None or MEASURED in row["note"] or machine.get("date") in (None, datetime.date.today().isoformat()):
        return row
    return row | {"note": ", ".join(filter(None, [row["note"], f"{MEASURED}{machine['date']}"]))}


def under(rates: dict[str, float], row: RowDict) -> RowDict:
    """The row with its roofline at other peak rates, which a later run into the same file may have raised."""
    if row["of_roofline"] is None or row["dtype"] not in rates:
        return row
    roofline, bound_by = bound(row["flops_rate"] * row["seconds"], row["bytes_rate"] * row["seconds"], row["dtype"], rates)
    return row | {"roofline": roofline, "bound_by": bound_by, "of_roofline": roofline / row["seconds"]}


def is_open(row: RowDict) -> bool:
    """Whether it has not been tried yet."""
    return row["note"] in (OUT_OF_TIME, NOT_REACHED)


def merged(old: Iterable[RowDict], new: Iterable[RowDict], ops: Sequence[str]) -> list[RowDict]:
    """All rows, ordered by op; those of an op that has got another name since are last. A new row replaces the old one of its
    case and candidate, unless it wasn't tried."""
    cases: dict[str, dict[str, RowDict]] = {}
    for row in (*old, *new):
        candidates = cases.setdefault(str([row[name] for name in CASE]), {})
        before = candidates.get(row["candidate"])
        if before is None or is_open(before) or not is_open(row):
            candidates[row["candidate"]] = row
    rows = [row for candidates in cases.values() for row in candidates.values()]
    return sorted(rows, key=lambda row: [*ops, row["op"]].index(row["op"]))
