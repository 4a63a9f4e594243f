"""A run's rows as tables, in the terminal and in Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness.machine import COPY
from benchmarks.report import results_file, units
from benchmarks.report.results_file import RowDict

TITLES = {
    "thought_attention": "Attention of text and thoughts",
    "thought_decode": "Decoding: one new row of every thought",
    "sample_token": "Sampling tokens",
    "linear_logprob": "Log-probabilities",
    "branches": "Branches with one text in common",
    "trees": "Branches on branches",
    "step": "Whole models",
    "naive": "Thoughts at all positions: at once or one after another",
    "group_rl": "Group RL: a step of TRL's GRPOTrainer",
    "hybrid": "Hybrid models: branches through recurrent layers",
    "online": "RL on ordinary text: long thoughts at a few anchors",
    "memory": "Memory on long texts",
    "host": "Host time",
}
WITHOUT_A_ROOFLINE = ("memory", "host")  # they don't measure a device's time
VERDICTS = {True: "ok", False: "FAILED", None: ""}
HEADER = ["", "time", "range", "our speedup", "useful work", "of the roofline", "memory", "note"]


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
        "" if row["of_roofline"] is None else share(row),
        "" if row["peak_bytes"] is None else units.memory(row["peak_bytes"]),
        row["note"],
    ]


def share(row: RowDict) -> str:
    """Of the roofline; where bytes bound it, with the copy rate that it is a share of."""
    percent = units.percent(row["of_roofline"])
    if row["bound_by"] != "copy":
        return percent
    return f"{percent} of a copy at {units.bandwidth(row['bytes_rate'] / row['of_roofline'])}"


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
    print_table(title, HEADER, [cells(row) for row in rows])


def print_table(title: str, header: list[str], body: list[list[str]]) -> None:
    """Empty columns are left out."""
    lines = with_columns(header, body)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def with_columns(header: list[str], body: list[list[str]]) -> list[list[str]]:
    """Header and body without the columns that are empty in the body."""
    keep = [i for i in range(len(header)) if any(line[i] for line in body)]
    return [[line[i] for i in keep] for line in (header, *body)]


def markdown_table(header: list[str], body: list[list[str]]) -> list[str]:
    head, *lines = with_columns(header, body)
    lines = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def stage_table(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table of what the processes of ``make gpu`` found."""
    body = [[line["stage"], VERDICTS[line["passed"]], line["note"], f"{line['seconds']:.0f} s"] for line in lines]
    return ["stage", "", "found", "time"], body


def device_lines(results: dict[str, Any]) -> list[str]:
    """Device, date, versions, back ends and peak rates in a few lines of Markdown."""
    machine, rates = results["machine"], results["ceilings"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    missing = ", ".join(name for name, version in machine["packages"].items() if not version)
    served = ", ".join(f"{op} `{backend}`" for op, backend in machine["served_by"].items())
    code = machine.get("instructions")
    return [
        f"{machine['device']}, {machine['date']}. Python {machine['python']}, {packages}."
        + (f" Not installed here: {missing}." if missing else ""),
        "",
        f"Back ends: {served}. {f'The CPU library runs its code for {code}. ' if code else ''}{peak_line(rates)}"
        + (f" {results_file.DOUBT}" if results_file.copy_in_doubt(results) else ""),
    ]


def peak_line(rates: dict[str, float]) -> str:
    """The rates of ``machine.ceilings`` in words."""
    ways = [f"{name.removeprefix(COPY)} {units.bandwidth(rate)}" for name, rate in rates.items() if name.startswith(COPY)]
    rates = {name: rate for name, rate in rates.items() if not name.startswith(COPY)}
    matmuls = {tuple(name.split()): rate for name, rate in rates.items() if " " in name}
    shown = {x: units.bandwidth(rate) if x == "copy" else units.flops(rate) for x, rate in rates.items() if " " not in x}
    if not matmuls:
        speeds = [f"{name} {rate}" if name == "copy" else f"matmul {name} {rate}" for name, rate in shown.items()]
        of_ways = f" The copy by {', '.join(ways)}." if ways else ""
        return f"Measured peak rates: {', '.join(speeds) or 'none'}.{of_ways}"
    copy, float32, others = shown.pop("copy"), shown.pop("float32"), [f", {rate} in {name}" for name, rate in shown.items()]
    reached = [
        f"{units.flops(rate)} with {library} in {dtype} ({units.percent(rate / rates[dtype])})"
        for (library, dtype), rate in matmuls.items()
    ]
    return f"Peak: {float32} of multiply-adds in float32{''.join(others)}, copy {copy}. Matmuls reach {', '.join(reached)}."
