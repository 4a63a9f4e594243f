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
        name = re.sub(r".*/test_(\w+)\.py.*", r"\1", case["case"])
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


def faults(jobs: list[Any]) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for job in jobs:
        failures = re.findall(r"^(?:FAILED|ERROR) .*? - (.*)", job.output, re.M)
        verdict = "" if job.code == 0 else failures[0][:300] if failures else f"the process ended with {job.code}"
        found.setdefault(job.name, {"fault": job.name})[job.tool] = verdict
    return list(found.values())


STAGES: dict[str, Callable[[list[Any]], Any]] = {"suite": suite, "wrapper": suite, "modules": modules, "faults": faults}


def table(header: list[str], rows: list[list[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def cases_of(found: dict[str, Any]) -> list[str]:
    rows: list[list[object]] = []
    for name, counts in sorted(found["cases"].items()):
        rows.append([f"`{name}`", *(f"{counts.get(key, 0):,}" for key in ("passed", "failed", "skipped", "launches"))])
    lines = table(["tests", "passed", "failed", "skipped", "launches"], rows)
    launches = ", ".join(f"`{kernel}` {n:,}" for kernel, n in sorted(found["launches"].items()))
    lines += [
        "",
        f"{found['executed']:,} cases passed with launches, {sum(found['launches'].values()):,} launches: {launches}.",
    ]
    lines += [f"{found['races_unchecked']:,} launches were too large to be searched for races between programs."]
    if found["skipped"]:
        lines += ["", "Skipped: " + "; ".join(f"{why} ({n})" for why, n in found["skipped"].items()) + "."]
    lines += ["", *(f"- **{x['case']}**: {x['why']}" for x in found["failed"])]
    lines += [f"- **{name}**: the process left no result" for name in found["broken"]]
    return lines


def modules_table(rows: list[dict[str, Any]]) -> list[str]:
    cells: list[list[object]] = []
    for row in rows:
        if "failed" in row:
            cells.append([f"`{row['kernel']}`", row["target"], "", "", "not judged: " + clean(" ".join(row["failed"])), ""])
            continue
        verdicts = collections.Counter(row["verdicts"])
        lowered = sum("llvm dialect" in reason for reason in row.get("unjudged", ()))
        equal, all_ = verdicts["match"], sum(verdicts.values()) - lowered
        words = "all equal" if equal == all_ else f"{equal} equal, {all_ - equal} not judged or different"
        why = [clean(x) for x in row.get("unjudged", ()) if "llvm dialect" not in x]
        shared = row.get("shared", {})
        races = f"{shared['races']}; {shared['races_without_waits']} without waits" if shared else ""
        if shared.get("unjudged"):
            races += (
                f"; {len(shared['unjudged'])} of {shared['programs']} programs not to their end: {clean(shared['unjudged'][0])}"
            )
        cells.append([f"`{row['kernel']}`", row["target"], row["modules"], all_, "; ".join([words, *why[:2]]), races])
    return table(["kernel", "target", "modules", "different", "results", "races with copies"], cells)


def faults_table(rows: list[dict[str, str]]) -> list[str]:
    tools = {"interpreter": "Triton's interpreter", "ttsem": "ttsem", "compiler": "ahead of time"}
    return table(
        ["mistake", *tools.values()],
        [[x["fault"], *(kind(x[tool]) if tool in x else "not run" for tool in tools)] for x in rows],
    )


def kind(verdict: str) -> str:
    """What a tool said, in a few words."""
    if not verdict:
        return "finds nothing"
    words = {
        "both touch element": "a race",
        "past the end": "an access out of bounds",
        "before the start": "an access out of bounds",
        "undefined result": "an undefined result",
        "Unjudged": "can't go on",
        "the process ended": "crashes",
        "spills": "spills",
        "products wait": "products that wait",
    }
    found = next((said for sign, said in words.items() if sign in verdict), "values")
    line = re.search(r"`(\w+\.py:\d+)", verdict)
    return f"**{found}**" + (f", at {line[1]}" if line else "")


def clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")[:160]


def write(results: dict[str, Any], folder: Path) -> Path:
    shown = {"suite": cases_of, "modules": modules_table, "wrapper": cases_of, "faults": faults_table}
    parts = {stage: "\n".join(show(results[stage])) if stage in results else "Not run." for stage, show in shown.items()}
    took = ", ".join(f"{stages} in {seconds / 60:.0f} minutes" for stages, seconds in results["seconds"].items())
    page = folder / "executed.md"
    page.write_text(PAGE.read_text().format(**results["versions"], date=results["date"], took=took, **parts))
    return page
