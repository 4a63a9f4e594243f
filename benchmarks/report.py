"""A run's rows as tables: in the terminal, and as the page ``results/<device>.md``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import goals
import results_file
import units
from machine import slug
from missing import missing
from results_file import load

RESULTS = Path(__file__).parent / "results"
RowDict = dict[str, Any]
TITLES = {
    "thought_attention": "Attention of text and thoughts",
    "thought_decode": "Decoding, one new row of every thought",
    "sample_token": "Drawing tokens",
    "linear_logprob": "Log-probabilities",
    "step": "Whole models",
    "naive": "All positions at once against one after another",
    "memory": "Memory of long texts",
    "host": "Time of the host",
}
WITHOUT_A_FLOOR = ("memory", "host")  # what they measure is no time of a device
READING = (
    "A time is the median; candidates took turns on the same inputs and were checked for equal results first. Useful is what "
    "the layout makes visible, in FLOP/s, or in bytes/s where memory binds. The floor is the time that this work takes at the "
    "measured ceilings. Memory is what a call adds."
)
VERDICTS = {True: "ok", False: "FAILED", None: ""}
HEADER = ["", "time", "lowest to highest", "ours is faster by", "useful", "of the floor", "memory", ""]


def all_results(folder: Path = RESULTS) -> list[Path]:
    return sorted(folder.glob("*.json"))


def cells(row: RowDict) -> list[str]:
    """A row's cells under ``HEADER``."""
    if row["seconds"] is None:
        return [row["candidate"], *[""] * (len(HEADER) - 2), row["note"]]
    spread = "" if row["low"] is None else f"{units.seconds(row['low'])} to {units.seconds(row['high'])}"
    ratio = "" if row["is_ours"] or row["times_ours"] is None else units.times(row["times_ours"])
    return [
        row["candidate"],
        units.seconds(row["seconds"]),
        spread,
        ratio,
        _useful(row),
        "" if row["of_floor"] is None else units.percent(row["of_floor"]),
        "" if row["peak_bytes"] is None else units.memory(row["peak_bytes"]),
        row["note"],
    ]


def _useful(row: RowDict) -> str:
    if row["bytes_rate"] is None:
        return ""
    return units.flops(row["flops_rate"]) if row["bound_by"] == "matmul" else units.bandwidth(row["bytes_rate"])


def case_of(row: RowDict) -> str:
    """Such as "forward, B 1 L 256 N 2 S 14, float32"."""
    sizes = " ".join(f"{letter} {size}" for letter, size in row["sizes"].items())
    return ", ".join(filter(None, [row["what"], sizes, row["dtype"]]))


def by_case(rows: Iterable[RowDict]) -> Iterable[tuple[str, list[RowDict]]]:
    for case, group in itertools.groupby(rows, key=lambda row: f"{row['grid']}: {case_of(row)}"):
        yield case, list(group)


def print_case(rows: Sequence[RowDict]) -> None:
    """One case's table in the terminal."""
    title = f"{rows[0]['op']}, {rows[0]['grid']}: {case_of(rows[0])}"
    print_table(title, HEADER, [cells(row) for row in rows], bold=[row["is_ours"] for row in rows])


def print_goals(kind: str, rows: list[RowDict]) -> None:
    print_table("Goals", ["goal", "target", "reached", ""], goal_cells(kind, rows))


def goal_cells(kind: str, rows: list[RowDict]) -> list[list[str]]:
    return [[goal.what, *goal.verdict(rows)] for goal in goals.of(kind)]


def print_table(title: str, header: list[str], body: list[list[str]], bold: Sequence[bool] = ()) -> None:
    """By rich, where it is installed; columns without any content are left out."""
    keep = [i for i in range(len(header)) if any(line[i] for line in body)]
    header, body = [header[i] for i in keep], [[line[i] for i in keep] for line in body]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        print(f"\n{title}")
        for line in (header, *body):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i in (0, len(header) - 1) else "right")
    for i, line in enumerate(body):
        table.add_row(*line, style="bold green" if i < len(bold) and bold[i] else None)
    console = Console()
    console.print()
    console.print(table) if console.is_terminal else Console(width=200).print(table)


def markdown_table(header: list[str], body: list[list[str]]) -> list[str]:
    keep = [i for i in range(len(header)) if any(line[i] for line in body)]
    lines = [[header[i] for i in keep], ["---"] * len(keep), *([line[i] for i in keep] for line in body)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def stage_table(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and body of what the processes of ``make gpu`` found."""
    body = [[line["stage"], VERDICTS[line["passed"]], line["said"], f"{line['seconds']:.0f} s"] for line in lines]
    return ["stage", "", "found", "took"], body


def device_lines(results: dict[str, Any]) -> list[str]:
    """Device, date, versions and ceilings in a few lines of Markdown."""
    machine, rates = results["machine"], results["ceilings"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    missing = ", ".join(name for name, version in machine["packages"].items() if not version)
    served = ", ".join(f"{op} by `{backend}`" for op, backend in machine["served_by"].items())
    shown = {name: units.bandwidth(rate) if name == "copy" else units.flops(rate) for name, rate in rates.items()}
    speeds = [f"{name} {rate}" if name == "copy" else f"matmul {name} {rate}" for name, rate in shown.items()]
    return [
        f"{machine['device']}, {machine['date']}. Python {machine['python']}, {packages}."
        + (f" Not installed here: {missing}." if missing else ""),
        "",
        f"Ours: {served}. Measured ceilings: {', '.join(speeds) or 'none'}.",
    ]


def page(results: dict[str, Any], plots: Sequence[Path] = ()) -> str:
    """``results/<device>.md``."""
    rows = results["rows"]
    lines = [f"# {results['machine']['device']}", "", *device_lines(results), ""]
    lines += [
        f"By `{results['command']}`. {READING}",
        "",
        "## Goals",
        "",
        *markdown_table(["goal", "target", "reached", ""], goal_cells(results["machine"]["kind"], rows)),
        "",
    ]
    if "stages" in results:
        lines += ["## Stages", "", *markdown_table(*stage_table(results["stages"])), ""]
        lines += ["## Missing", "", *(f"- {said}" for said in missing(results) or ["Nothing."]), ""]
    for plot in plots:
        lines += [f"![{plot.stem}]({plot.name})", ""]
    for op, title in TITLES.items():
        mine = [row for row in rows if row["op"] == op]
        if mine:
            lines += [f"## {title}: {op}", ""]
        for case, group in by_case(mine):
            lines += [f"**{case}**", "", *markdown_table(HEADER, [cells(row) for row in group]), ""]
    return "\n".join(lines)


def write(results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """``write_page`` and the list of pages. Returns the page's path."""
    path = write_page(results, folder)
    results_file.write(index(folder), folder / "README.md")
    return path


def write_page(results: dict[str, Any], folder: Path) -> Path:
    """The JSON file, its plots where matplotlib is, and the page. Returns the page's path."""
    path = folder / f"{slug(results['machine']['device'])}.md"
    results_file.save(results, path.with_suffix(".json"))
    try:
        from plots import draw
    except ImportError:
        drawn: list[Path] = []
    else:
        drawn = draw(results, folder, path.stem)
    results_file.write(page(results, drawn), path)
    return path


def index(folder: Path = RESULTS) -> str:
    """``results/README.md``: what was measured, and how to measure what was not."""
    found = [(path, load(path)["machine"]) for path in all_results(folder)]
    lines = ["# Results", ""]
    for kind, title, command in (("cpu", "CPUs", "make bench"), ("cuda", "GPUs", "make gpu")):
        lines += [f"## {title}", ""]
        measured = [(path, machine) for path, machine in found if machine["kind"] == kind]
        lines += [f"- [{machine['device']}]({path.stem}.md), {machine['date']}" for path, machine in measured]
        again = "Measure another one" if measured else "Not measured. Measure one"
        lines += [*([""] if measured else []), f"{again} with `{command}`, which writes its page here.", ""]
    return "\n".join(lines)
