"""Writes docs/experiments.md from results: for each experiment a table of methods and controls, a plot and the thresholds."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch

from quietstar.evaluation.intervals import mean_interval
from quietstar.files.writing import write_whole

Result = dict[str, Any]


def write(results: dict[str, list[Result]], size: str, folder: Path) -> tuple[Path, bool]:
    """Write the page. Returns its path and whether every threshold was met."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, summary, held, seconds = [], [], True, 0.0
    for name, seeds in results.items():
        experiment = importlib.import_module(name)
        checks = experiment.check(seeds)
        missed = [check["what"] for check in checks if not check["passed"]]
        held &= not missed
        seconds += sum(result["seconds"] for result in seeds)
        link = f"[{experiment.TITLE}](#{anchor(experiment.TITLE)})"
        summary.append([link, f"{len(checks) - len(missed)} of {len(checks)}", "; ".join(missed)])
        parts.append(section(experiment, name, seeds, checks, folder))
    page = folder / "experiments.md"
    write_whole(page, "\n\n".join([introduction(size, seconds, summary), *parts]) + "\n")
    return page, held


def introduction(size: str, seconds: float, summary: list[list[str]]) -> str:
    curves = "python experiments/run_experiments.py doses objectives --docs docs    # Quiet-STaR's own curves"
    commands = "make experiments-full" if size == "full" else f"make experiments\n{curves}"
    return f"""# Experiments

This page compares each recipe with its controls, on problems that a small model can learn from scratch. What did not work is
here, too. The page is written by

```sh
{commands}
```

Figures are means over the seeds, with a 95 % interval over the seeds. A threshold is met if the mean meets it. Speeds are
rough: two experiments ran at once, next to other work.

{markdown(["experiment", "thresholds met", "not met"], summary)}

In total {seconds / 60:.0f} minutes of one core, with torch {torch.__version__} on {platform.machine()}, one thread per
process."""


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def section(experiment: ModuleType, name: str, seeds: list[Result], checks: list[Result], folder: Path) -> str:
    paragraphs = (experiment.__doc__ or "").strip().split("\n\n")
    minutes = fmean(result["seconds"] for result in seeds) / 60
    blocks = [
        f"## {experiment.TITLE}",
        *(paragraph.replace("\n", " ") for paragraph in paragraphs),
        rows_table(seeds),
        checks_table(checks),
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {minutes:.1f} minutes of a core each.",
    ]
    if hasattr(experiment, "plot"):
        picture = folder / f"experiments_{name}.png"
        caption = experiment.plot(seeds, picture)
        blocks.insert(-2, f"![{caption}]({picture.name})")
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


def checks_table(checks: list[Result]) -> str:
    lines = []
    for x in checks:
        each = " ".join("none" if value is None else f"{value:.3f}" for value in x["values"])
        lines.append([x["what"], f"{x['value']:.3f}", x["wanted"], "yes" if x["passed"] else "**no**", each])
    return markdown(["threshold", "mean", "wanted", "met", "each seed"], lines)


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
    mean, low, high = mean_interval(numbers)
    if counts:
        return f"{mean:,.0f}"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ± {(high - low) / 2:.3f}"
