"""docs/experiments.md from results: a table of methods and controls, the thresholds, and a plot for each experiment."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch

from quietstar.files import write_whole
from quietstar.intervals import mean_interval

Result = dict[str, Any]


def write(results: dict[str, list[Result]], size: str, folder: Path) -> tuple[Path, bool]:
    """The page, and whether every threshold held."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, held, seconds = [], True, 0.0
    for name, seeds in results.items():
        experiment = importlib.import_module(name)
        checks = experiment.check(seeds)
        held &= all(check["passed"] for check in checks)
        seconds += sum(result["seconds"] for result in seeds)
        parts.append(section(experiment, name, seeds, checks, folder))
    page = folder / "experiments.md"
    write_whole(page, "\n\n".join([introduction(results, size, seconds), *parts]) + "\n")
    return page, held


def introduction(results: dict[str, list[Result]], size: str, seconds: float) -> str:
    command = "make experiments-full" if size == "full" else "make experiments"
    return f"""# Experiments

Each recipe against its controls, on problems that a small model from scratch can learn, written by `{command}`.
Figures are means over the seeds, with a 95 % interval over the seeds; a threshold holds, or doesn't, for the mean. What did
not work is here too.

{seconds / 60:.0f} minutes of one core in all, with torch {torch.__version__} on {platform.machine()}, a thread a process."""


def section(experiment: ModuleType, name: str, seeds: list[Result], checks: list[Result], folder: Path) -> str:
    about = (experiment.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    minutes = fmean(result["seconds"] for result in seeds) / 60
    blocks = [
        f"## {experiment.TITLE}",
        about,
        rows_table(seeds),
        checks_table(checks),
        f"{len(seeds)} seeds, {minutes:.1f} minutes each.",
    ]
    if hasattr(experiment, "plot"):
        picture = folder / f"experiments_{name}.png"
        caption = experiment.plot(seeds, picture)
        blocks.insert(3, f"![{caption}]({picture.name})")
    return "\n\n".join(blocks)


def rows_table(seeds: list[Result]) -> str:
    """A line for each method or control: every figure's mean over the seeds and its interval."""
    runs = list(dict.fromkeys(row["run"] for result in seeds for row in result["rows"]))
    columns = list(dict.fromkeys(key for result in seeds for row in result["rows"] for key in row if key != "run"))
    lines = []
    for run in runs:
        rows = [row for result in seeds for row in result["rows"] if row["run"] == run]
        lines.append([run, *(_mean([row.get(column) for row in rows]) for column in columns)])
    return markdown(["run", *(column.replace("_", " ") for column in columns)], lines)


def checks_table(checks: list[Result]) -> str:
    lines = []
    for x in checks:
        each = " ".join("none" if value is None else f"{value:.3f}" for value in x["values"])
        lines.append([x["what"], f"{x['value']:.3f}", x["wanted"], "yes" if x["passed"] else "**no**", each])
    return markdown(["threshold", "mean", "wanted", "holds", "of each seed"], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = "| " + " | ".join(["---"] * len(head)) + " |"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def _mean(values: list[Any]) -> str:
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if not numbers:
        return ""
    mean, low, high = mean_interval(numbers)
    if all(x == int(x) for x in numbers) and max(map(abs, numbers)) > 1:
        return f"{mean:,.0f}"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ± {(high - low) / 2:.3f}"
