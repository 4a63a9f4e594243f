"""Writes a part of docs/results.md from results: a table of the claims, then for each experiment its runs and a plot."""

from __future__ import annotations

import importlib
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from experiments_checks import Check, margin
from experiments_results import Result, Results

from benchmarks.report.committed import write_block

LONG = "full"  # the size whose results stand in a part of their own


def write(results: dict[str, Results], folder: Path) -> tuple[Path, bool]:
    """Write results by size into the page. Returns its path and whether every threshold was met."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, claims, held = [], [], True
    for size in sorted(results, key=lambda size: size == LONG):
        if size == LONG and results[size]:
            parts.append(long_introduction(results[size]))
        for name, seeds in results[size].items():
            experiment = importlib.import_module(name)
            checks = experiment.check(seeds)
            held &= all(check["passed"] for check in checks)
            suffix = f"_{LONG}" if size == LONG else ""
            parts.append(section(experiment, seeds, checks, folder / f"experiments_{name}{suffix}.png", bool(suffix)))
            if size != LONG:
                claims += claim_lines(experiment, checks)
    page = folder / "results.md"
    short = [seeds for size, found in results.items() if size != LONG for seeds in found.values()]
    table = markdown(["method", "claim", "ours", "best control", "gap", "wanted", "holds"], claims)
    write_block(page, "experiments", "\n\n".join([table, cost(short), *parts]))
    return page, held


def cost(results: list[list[Result]]) -> str:
    """What was measured with what, and how long it took."""
    seeds = [result for several in results for result in several]
    minutes = sum(result["seconds"] for result in seeds) / 60
    parts = sum(result.get("resumed", False) for result in seeds)
    missing = f" For {parts} of the seeds, stopped and resumed, only the last part is counted." if parts else ""
    return f"In total {minutes:.0f} minutes of one core{made_with(seeds)}, one thread per process.{missing}"


def made_with(seeds: list[Result]) -> str:
    """Dates, versions and machines of results, which older ones don't have."""
    dates = sorted({result["date"] for result in seeds if "date" in result})
    versions = sorted(
        {f"torch {result['versions']['torch']} on {result['machine']}" for result in seeds if "versions" in result}
    )
    between = f", {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}" if dates else ""
    return between + (f", with {' and '.join(versions)}" if versions else "")


def long_introduction(results: Results) -> str:
    seeds = [result for several in results.values() for result in several]
    return f"### Long runs\n\nThe same with longer training{made_with(seeds)}."


def claim_lines(experiment: ModuleType, checks: list[Check]) -> list[list[str]]:
    """For each claim a line with the best of its controls."""
    lines = []
    for claim in dict.fromkeys(check["claim"] for check in checks if "claim" in check):
        several = [check for check in checks if check.get("claim") == claim]
        best = min(several, key=lambda check: check["value"])
        holds = all(check["passed"] for check in several)
        each = all(value is not None and value >= check["bound"] for check in several for value in check["values"])
        lines.append(
            [
                f"[{experiment.TITLE}](#{anchor(experiment.TITLE)})",
                claim,
                _mean(best["ours"], False),
                f"{best['control']}: {_mean(best['theirs'], False)}",
                _mean(best["values"], False),
                best["wanted"],
                ("yes" if each else "on average") if holds else "**no**",
            ]
        )
    return lines


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def section(experiment: ModuleType, seeds: list[Result], checks: list[Check], picture: Path, long: bool) -> str:
    paragraphs = (experiment.__doc__ or "").strip().split("\n\n")
    minutes = fmean(result["seconds"] for result in seeds) / 60
    cost = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {minutes:.1f} minutes of a core each{made_with(seeds)}."
    blocks = [
        f"### {experiment.TITLE}{', long' if long else ''}",
        *(paragraph.replace("\n", " ") for paragraph in paragraphs if not long),
        rows_table(seeds),
        f"{thresholds(checks)} {cost}",
    ]
    if hasattr(experiment, "plot"):
        caption = experiment.plot(seeds, picture)
        blocks.insert(-1, f"![{caption}]({picture.name})")
    return "\n\n".join(blocks)


def rows_table(seeds: list[Result]) -> str:
    """One line per method or control, with the mean of every figure over the seeds and its interval."""
    rows = [row for result in seeds for row in result["rows"]]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "run"]
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        several = [row for row in rows if row["run"] == run]
        lines.append([run, *(_mean([row.get(key) for row in several], _counts(rows, key)) for key in columns)])
    return markdown(["run", *(key.replace("_", " ") for key in columns)], lines)


def thresholds(checks: list[Check]) -> str:
    """How many thresholds are met, and those that are not."""
    missed = "; ".join(f"{x['what']} {_mean(x['values'], False)}, wanted {x['wanted']}" for x in checks if not x["passed"])
    met = sum(x["passed"] for x in checks)
    return f"{met} of {len(checks)} thresholds are met" + (f"; not met: {missed}." if missed else ".")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = "| " + " | ".join(["---"] * len(head)) + " |"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def _counts(rows: list[Result], key: str) -> bool:
    """Whether a column holds counts rather than shares or nats."""
    numbers = [row[key] for row in rows if row.get(key) is not None]
    return all(isinstance(x, int) for x in numbers) and max(numbers, default=0) > 1


def _mean(values: list[Any], counts: bool) -> str:
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return ""
    if counts:
        return f"{fmean(numbers):,.0f}"
    half = margin(numbers)
    return f"{fmean(numbers):.3f}" if half is None else f"{fmean(numbers):.3f} ± {half:.3f}"
