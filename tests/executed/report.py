"""The page of ``make executed``: docs/executed.md, from docs/executed.json."""

from __future__ import annotations

import collections
import importlib.metadata
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("page.md")


def versions() -> dict[str, str]:
    names = ("triton", "ttsem", "torch", "numpy")
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}


def suite(jobs: list[Any]) -> dict[str, Any]:
    """Cases by file and outcome, launches by kernel, and the names of what failed or wasn't judged."""
    cases = [case for job in jobs for case in job.result.get("cases", ())]
    by_file: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in cases:
        name = re.sub(r".*/(?:test_(\w+)\.py|gluon\.py::test_(\w+)).*", r"\1\2", case["case"])
        by_file[name].update({case["outcome"]: 1, "launches": case["launches"]})
    launches = sum((collections.Counter(job.result.get("launches", {})) for job in jobs), collections.Counter())
    return {
        "cases": by_file,
        "executed": sum(case["outcome"] == "passed" and case["launches"] > 0 for case in cases),
        "launches": launches,
        "races_unchecked": sum(job.result.get("races_unchecked", 0) for job in jobs),
        "failed": [{"case": case["case"], "why": case["why"]} for case in cases if case["outcome"] == "failed"],
        "skipped": collections.Counter(case["why"] for case in cases if case["outcome"] == "skipped"),
        "broken": [job.name for job in jobs if not job.result],
    }


def modules(jobs: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for job in jobs:
        failed = [case["why"] for case in job.result.get("cases", ()) if case["outcome"] == "failed"]
        for kernel, found in job.result.get("modules", {}).items():
            rows.append({"target": f"sm_{job.cc}", "kernel": kernel, **found})
        if failed or not job.result:
            rows.append({"target": f"sm_{job.cc}", "kernel": job.name, "failed": failed or [job.output[-500:]]})
    return rows


def gluon(jobs: list[Any]) -> dict[str, Any]:
    """As ``suite``, and how each mistake was found, by schedule."""
    found: dict[str, dict[str, str | None]] = collections.defaultdict(dict)
    for case in (case for job in jobs for case in job.result.get("cases", ())):
        if "mistake" in case.get("properties", {}):
            mistake, schedule, how = case["properties"]["mistake"]
            found[mistake][schedule] = how
    right = [job for job in jobs if job.name != "mistakes"]
    slowest = max((case["seconds"] for job in right for case in job.result.get("cases", ())), default=0)
    wrong = suite([job for job in jobs if job.name == "mistakes"])
    return suite(right) | {"slowest": slowest, "mistakes": found, "not_as_expected": wrong["failed"] + wrong["broken"]}


STAGES: dict[str, Callable[[list[Any]], Any]] = {"suite": suite, "wrapper": suite, "modules": modules, "gluon": gluon}


def table(header: list[str], rows: list[list[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def cases_of(found: dict[str, Any]) -> str:
    """How many cases passed, what failed, and what was left out."""
    counts = collections.Counter(outcome for case in found["cases"].values() for outcome in case for _ in range(case[outcome]))
    launches = f"{sum(found['launches'].values()):,} launches of {len(found['launches'])} kernels"
    said = f"{found['executed']:,} cases passed with {launches}; {counts['failed']} failed, {counts['skipped']} were skipped."
    if found["races_unchecked"]:
        said += f" {found['races_unchecked']:,} launches were too large to be searched for races between programs."
    failed = [f"{x['case']}: {x['why']}" for x in found["failed"]] + [f"{x}: no result" for x in found["broken"]]
    return "\n".join([said, *(f"- **{why}**" for why in failed)])


def mistakes_table(found: dict[str, Any]) -> str:
    """A line for each mistake, and what was found otherwise than the test says."""
    lines: list[list[object]] = [[mistake, *(how or "-" for how in by.values())] for mistake, by in found["mistakes"].items()]
    schedules = next(iter(found["mistakes"].values()), {})
    return "\n".join([table(["mistake", *schedules], lines), *(f"- **{x}**" for x in found["not_as_expected"])])


def modules_table(rows: list[dict[str, Any]]) -> str:
    """A line for each target, and a line for each launch that wasn't equal or judged."""
    lines, wrong = [], []
    for target in dict.fromkeys(row["target"] for row in rows):
        judged = [row for row in rows if row["target"] == target and "failed" not in row]
        shared = [row.get("shared", {}) for row in judged]
        for row in rows:
            if row["target"] == target and (problem := module_problem(row)):
                wrong.append(f"- **{row['kernel']}, {target}**: {problem}")
        different = sum(row["verdicts"].get("match", 0) for row in judged)
        races, without = (sum(x.get(name, 0) for x in shared) for name in ("races", "races_without_waits"))
        ended = sum(x.get("programs", 0) - len(x.get("unjudged", ())) for x in shared)
        programs = sum(x.get("programs", 0) for x in shared)
        modules = max((row["modules"] for row in judged), default=0)
        lines.append([target, len(judged), modules, different, races, without, f"{ended} of {programs}"])
    head = ["target", "launches", "modules of each", "different, equal", "pairs", "without waits", "programs to their end"]
    return "\n".join([table(head, lines), *wrong])


def module_problem(row: dict[str, Any]) -> str:
    if "failed" in row:
        return " ".join(row["failed"])[:160]
    lowered = sum("llvm dialect" in reason for reason in row.get("unjudged", ()))
    other = sum(row["verdicts"].values()) - lowered - row["verdicts"].get("match", 0)
    return f"{other} modules not judged or different" if other else ""


def write(results: dict[str, Any], folder: Path) -> Path:
    shown = {"suite": cases_of, "modules": modules_table, "wrapper": cases_of, "gluon": cases_of}
    parts = {stage: show(results[stage]) if stage in results else "Not run." for stage, show in shown.items()}
    parts["mistakes"] = mistakes_table(results["gluon"]) if "gluon" in results else ""
    took = ", ".join(f"{stages} in {seconds / 60:.0f} minutes" for stages, seconds in results["seconds"].items())
    page = folder / "executed.md"
    page.write_text(PAGE.read_text().format(**results["versions"], date=results["date"], took=took, **parts))
    return page
