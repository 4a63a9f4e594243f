"""What was measured as tables: a header and rows of strings, and how to write them."""

from __future__ import annotations

import html
from typing import Any

from quietstar.evaluation.intervals import PARTS, format_gain, wilson
from sums.results import POSITIONS, Results, how_scored, pooled, total

Rows = list[list[str]]


def share(rows: list[dict[str, Any]], how: str) -> str:
    """Exact match with its 95 % interval; empty where there are no such thoughts."""
    if how not in rows[0]:
        return ""
    right, lines = total(rows, how)
    low, high = wilson(right, lines)
    return f"{right / lines:.3f} [{low:.3f}, {high:.3f}]"


def mean(rows: list[dict[str, Any]], name: str, form: str) -> str:
    values = [row[name] for row in rows if name in row]
    return form.format(sum(values) / len(values)) if values else ""


def main_table(results: Results) -> tuple[list[str], Rows]:
    header = ["thoughts", "run", "loss", "exact match, sampled", "exact match, greedy", "right thoughts", "distinct", "seconds"]
    body = []
    for group in pooled(results):
        rows = group["rows"]
        how = how_scored(rows)
        cells = [group["setting"], group["run"], f"{sum(row[how]['nll'] for row in rows) / len(rows):.2f}"]
        cells += [share(rows, "sampled"), share(rows, "greedy"), mean(rows, "right_thoughts", "{:.3f}")]
        body.append([*cells, mean(rows, "distinct_thoughts", "{:.0f}"), mean(rows, "seconds", "{:.0f}")])
    return header, body


def checks_table(results: Results) -> tuple[list[str], Rows]:
    """A row for each threshold, with the values of all seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for seed in results["seeds"]:
        for check in seed["checks"]:
            groups.setdefault((check["setting"], check["what"], check["wanted"]), []).append(check)
    body = []
    for (setting, what, wanted), checks in groups.items():
        verdict = "pass" if all(check["passed"] for check in checks) else "FAIL"
        body.append([verdict, setting, what, wanted, " ".join(f"{check['value']:.3f}" for check in checks)])
    return ["", "setting", "measure", "threshold", "value of each seed"], body


def thoughts_table(results: Results) -> tuple[list[str], Rows]:
    """The first seed's thoughts in its first setting."""
    header = ["text", "thought before", "thought after", "right sums", "p(answer) without", "p(answer) with", "w"]
    first = results["seeds"][0]["thoughts"]
    body = [
        [t["line"], t["before"], t["after"], t["right"], f"{t['p_without']:.2f}", f"{t['p_with']:.2f}", f"{t['w']:.2f}"]
        for t in (next(iter(first.values())) if first else [])
    ]
    return header, body


def gains_table(results: Results) -> tuple[list[str], Rows]:
    """The gain of the answer's thought and its two parts, nats, with 95 % intervals over lines; empty in older results."""
    body = [
        [setting, f"seed {seed['seed']}", *(format_gain(gains, part, 2) for part in PARTS)]
        for seed in results["seeds"]
        for setting, gains in seed.get("gains", {}).items()
    ]
    return ["thoughts", "", "gain", "= mixing, another line's thought", "+ content, own over another's"], body


def positions_table(results: Results) -> tuple[list[str], Rows]:
    """Mixing weight and gain at each position of a line."""
    body = [
        [f"seed {seed['seed']}", name, *(f"{round(value, 2) + 0.0:.2f}" for value in seed["positions"][key])]
        for seed in results["seeds"]
        if seed["positions"]
        for key, name in (("w", "w"), ("gain", "gain, nats"))
    ]
    return ["", "", *POSITIONS], body


def as_text(header: list[str], rows: Rows) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )


def as_markdown(header: list[str], rows: Rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def as_html(header: list[str], rows: Rows) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"
