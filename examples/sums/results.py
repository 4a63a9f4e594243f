"""The results file, from which all tables, plots and pages are made."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quietstar.files.reading import as_type, read_json
from quietstar.files.writing import write_whole

Results = dict[str, Any]
POSITIONS = ["d", "d", "d", "d", "d", "=", "a"]  # of a line that think


def describe_machine() -> Results:
    """The head of a results file, without seeds yet."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "seeds": [],
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def earlier_seeds(path: Path, now: Results) -> list[dict[str, Any]]:
    """The finished seeds of an interrupted run; none if there is no file.

    Raises:
        ValueError: the file is from a run with other options, or from another machine or other versions.
    """
    if not path.exists():
        return []
    saved = read_results(path)
    for name in now:
        if name != "seeds" and saved.get(name) != now[name]:
            raise ValueError(f"{path} was made with {name}={saved.get(name)!r}, not {now[name]!r}: take another --out")
    return saved["seeds"]


def read_results(path: Path) -> Results:
    """A results file. Raises ValueError if it is missing or is none."""
    results = read_json(path, Results)
    as_type(list[Results], results.get("seeds"), f"{path}: seeds")
    return results


def write_json(results: Results, path: Path) -> None:
    write_whole(path, json.dumps(rounded(results), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same with every number rounded to four decimals."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


def pooled(results: Results) -> list[dict[str, Any]]:
    """One entry for each run of each setting: the rows of all seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in results["seeds"]:
        for row in seed["rows"]:
            groups.setdefault((row["setting"], row["run"]), []).append(row)
    return [{"setting": setting, "run": run, "rows": rows} for (setting, run), rows in groups.items()]


def how_scored(rows: list[dict[str, Any]]) -> str:
    """The kind of thoughts to show: sampled ones where a run has both kinds."""
    return "sampled" if "sampled" in rows[0] else "greedy"


def exact_match(row: dict[str, Any], how: str) -> float:
    return row[how]["right"] / row[how]["lines"]


def total(rows: list[dict[str, Any]], how: str) -> tuple[int, int]:
    """Right answers and lines of all seeds."""
    return sum(row[how]["right"] for row in rows), sum(row[how]["lines"] for row in rows)
