"""Writes a part of docs/recipe-results.md from results: a table of the claims, then for each experiment its runs and a plot."""

from __future__ import annotations

import importlib
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from experiments_claims import HOLDS, NO, OPEN, hardest, margin
from experiments_results import FRESH, Result, Results

from benchmarks.report.committed import write_block

ABLATIONS = "full"  # the size of which the page has plots only; the figures are in experiments.json


def write(results: dict[str, Results], folder: Path) -> Path:
    """Write results, by size, into the page, whose path is returned. Where there are fresh seeds, the runs shown are theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = results.get(FRESH, {})
    shown = {size: found for size, found in results.items() if size != FRESH}
    ablations = shown.pop(ABLATIONS, {})
    parts, claims, verdicts = [], [], []
    for found in shown.values():
        for name, seeds in found.items():
            experiment = importlib.import_module(name)
            parts.append(section(experiment, fresh.get(name, seeds), folder / f"experiments_{name}.png"))
            lines, states = claim_lines(experiment, fresh.get(name, seeds))
            claims += lines
            verdicts += states
    if ablations:
        parts.append(ablations_section(ablations, folder))
    page = folder / "recipe-results.md"
    short = [seeds for size, found in results.items() if size != ABLATIONS for seeds in found.values()]
    head = ["method", "claim", "ours", "hardest of the claim's controls", "gap", "lowest, highest", "above 0", "verdict"]
    write_block(page, "experiments", "\n\n".join([markdown(head, claims), counted(verdicts), cost(short), *parts]))
    return page


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


def ablations_section(results: Results, folder: Path) -> str:
    """A plot for each experiment."""
    seeds = [result for several in results.values() for result in several]
    links = []
    for name, several in results.items():
        experiment = importlib.import_module(name)
        if hasattr(experiment, "plot"):
            picture = folder / f"experiments_{name}_{ABLATIONS}.png"
            experiment.plot(several, picture)
            links.append(f"[{experiment.TITLE}]({picture.name})")
    runs = f"The same with more runs beside them, some of them longer{made_with(seeds)}. Their figures are in experiments.json."
    return f"### Ablations\n\n{runs} One seed each shows where to look, and resolves nothing. Plots: {'; '.join(links)}."


def claim_lines(experiment: ModuleType, seeds: list[Result]) -> tuple[list[list[str]], list[str]]:
    """For each claim a line of the table, and its verdict."""
    lines, verdicts = [], []
    for claim in getattr(experiment, "CLAIMS", ()):  # curves claim nothing
        gap = hardest(claim, seeds)
        numbers = [value for value in gap.values if value is not None]
        lines.append(
            [
                f"[{experiment.TITLE}](#{anchor(experiment.TITLE)})",
                claim.text,
                f"{claim.run}: {_mean(gap.ours, False)}",
                f"{gap.control}: {_mean(gap.theirs, False)}" if gap.control else "0",
                _mean(gap.values, False),
                f"{min(numbers):.3f}, {max(numbers):.3f}" if numbers else "",
                f"{sum(value > 0 for value in numbers)} of {len(gap.values)} seeds",
                emphasized(gap.state),
            ]
        )
        verdicts.append(gap.state)
    return lines, verdicts


def emphasized(state: str) -> str:
    return f"**{state}**" if state in (OPEN, NO) else state


def counted(verdicts: list[str]) -> str:
    """How many claims hold, are not resolved, or are not so."""
    holds, left_open, no = (verdicts.count(state) for state in (HOLDS, OPEN, NO))
    return f"{holds} of {len(verdicts)} claims hold; not resolved: {left_open}, not so: {no}."


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def section(experiment: ModuleType, seeds: list[Result], picture: Path) -> str:
    paragraphs = (experiment.__doc__ or "").strip().split("\n\n")
    minutes = fmean(result["seconds"] for result in seeds) / 60
    number = f"{len(seeds)} seed{'s' * (len(seeds) > 1)} from {seeds[0]['seed']}"
    cost = f"{number}, {minutes:.1f} minutes of a core each{made_with(seeds)}."
    blocks = [
        f"### {experiment.TITLE}",
        *(paragraph.replace("\n", " ") for paragraph in paragraphs),
        *([rows_table(seeds)] if hasattr(experiment, "CLAIMS") else []),  # curves are plots
        cost,
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
