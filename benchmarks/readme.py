"""Write the README's chart, the tables of docs/performance.md, branches.md and hybrid-models.md, and the pages of results, from
the committed results.

python -m benchmarks.readme
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from benchmarks.harness.candidate import PACKAGE
from benchmarks.report import pages, ratios, results_file, tables, units
from benchmarks.report.committed import write_block
from benchmarks.report.plots import BASELINE_COLORS, OURS_COLOR

ROOT = Path(__file__).parents[1]
PERFORMANCE, BRANCHES, HYBRID, CHART = (
    ROOT / "docs" / name for name in ("performance.md", "branches.md", "hybrid-models.md", "performance.svg")
)
SHOWN = ("headline", "Llama 8B, LoRA")  # grids
IN_DOUBT = "Its copy rate is in doubt, so shares of a copy may be too high ([log](log.md))."
# What the chart calls the headline cases that it shows, in its order.
CHARTED = {
    ("group_rl", "loss and backward"): "group RL: GRPO's loss and backward",
    ("branches", "forward"): "group RL: attention, forward",
    ("branches", "forward+backward"): "group RL: attention, with backward",
    ("trees", "forward"): "turns that branch: attention, forward",
    ("trees", "forward+backward"): "turns that branch: attention, with backward",
    ("thought_attention", "forward"): "thoughts: attention, forward",
    ("thought_attention", "forward+backward"): "thoughts: attention, with backward",
    ("thought_decode", "forward"): "thoughts: a decoding step",
    ("step", "rollout"): "thoughts: sampling all",
    ("step", "training step"): "thoughts: a training step",
    ("hybrid", "forward"): "hybrids: a recurrent layer, forward",
    ("hybrid", "forward+backward"): "hybrids: a recurrent layer, with backward",
    ("online", "step"): "long thoughts: a training step of RLP",
    ("sample_token", "forward"): "sampling a token",
    ("linear_logprob", "forward"): "log-probabilities, forward",
    ("linear_logprob", "forward+backward"): "log-probabilities, with backward",
}


def section(folder: Path = pages.RESULTS) -> str:
    """A table of the headline cases for each measured device."""
    return "\n".join(device_section(path, results_file.load(path)) for path in pages.all_results(folder))


def device_section(path: Path, results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(
        f"{name} {machine['packages'][name]}" for name in ("torch", "transformers") if machine["packages"][name]
    )
    lines = [
        f"**{machine['device']}**, {machine['date']}, {packages}; all cases are in "
        f"[{path.name}](../benchmarks/results/{path.name})." + (f" {IN_DOUBT}" if results_file.copy_in_doubt(results) else ""),
        "",
    ]
    body = []
    timed = (row for row in results["rows"] if row["grid"] in SHOWN and row["op"] not in tables.WITHOUT_A_ROOFLINE)
    for _, rows in tables.by_case(timed):
        mine = next(row for row in rows if row["is_ours"])
        if mine["seconds"] is not None:
            baselines = [row for row in rows if row["times_ours"] is not None and is_rival(row)]
            faster = "; ".join(f"{row['candidate']} {units.number(row['times_ours'])}" for row in baselines)
            name = "" if mine["grid"] == "headline" else f"{mine['grid']}: "
            case = f"`{mine['op']}` {name}{tables.case_of(mine)}"
            body.append([case, units.seconds(mine["seconds"]), tables.share(mine), faster])
    return "\n".join([*lines, *tables.markdown_table(["", "time", "of the roofline", "times faster than"], body), ""])


def is_rival(row: results_file.RowDict) -> bool:
    """Whether this is another implementation of all the work. Ours with another back end is not."""
    return not row["is_ours"] and not row["is_partial"] and not row["version"].startswith(PACKAGE)


def chart(folder: Path = pages.RESULTS) -> str:
    """An SVG: for each device and headline case, how many times as long the fastest alternative takes."""
    height, names = 19, 310  # of a line; width of the names
    lines: list[tuple[str, float | None, str]] = []
    for path in pages.all_results(folder):
        results = results_file.load(path)
        fastest: dict[tuple[str, str], Any] = {}
        for row in results["rows"]:
            case = row["op"], row["what"]
            if row["grid"] == "headline" and row["times_ours"] is not None and is_rival(row) and case in CHARTED:
                fastest[case] = min(fastest.get(case, row), row, key=lambda row: row["times_ours"])
        if fastest:
            lines.append((results["machine"]["device"], None, ""))
        lines += [(CHARTED[x], fastest[x]["times_ours"], fastest[x]["candidate"]) for x in CHARTED if x in fastest]
    unit = min(34, 240 / max((times or 1 for _, times, _ in lines), default=1))  # width of once as long
    shapes = []
    for i, (name, times, rival) in enumerate(lines):
        y = 58 + i * height
        if times is None:
            shapes.append(f'<text x="12" y="{y}" font-weight="bold">{escape(name)}</text>')
            continue
        end = names + unit * times
        shapes += [
            f'<text x="{names - 8}" y="{y}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{names}" y="{y - 11}" width="{end - names:.1f}" height="14" fill="{BASELINE_COLORS[0]}"/>',
            f'<text x="{end + 6:.1f}" y="{y}"><tspan font-weight="bold">{units.number(times)}</tspan>'
            f' <tspan fill="#555555">{escape(rival)}</tspan></text>',
        ]
    bottom, one = 50 + len(lines) * height, f"{names + unit:.4g}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {bottom + 8}" font-family="sans-serif" font-size="13">',
            "<title>How many times as long the fastest alternative takes</title>",
            f'<rect width="860" height="{bottom + 8}" rx="6" fill="#ffffff"/>',
            '<text x="12" y="22" font-size="15">How many times as long the fastest alternative takes</text>',
            *shapes,
            f'<line x1="{one}" x2="{one}" y1="44" y2="{bottom}" stroke="{OURS_COLOR}" stroke-width="2"/>',
            f'<text x="{one}" y="40" text-anchor="middle" fill="{OURS_COLOR}">this package</text>',
            "</svg>\n",
        ]
    )


def blocks(folder: Path = pages.RESULTS) -> dict[tuple[Path, str], str]:
    """What is written into pages, by page and name of the block."""
    found = [results_file.load(path) for path in pages.all_results(folder)]
    kinds = {"branches": ratios.of_branches, "trees": ratios.of_trees}
    tables_of = {op: [line for results in found for line in ratios.table(results, op, kinds[op])] for op in kinds}
    hybrid = "\n".join(line for results in found for line in ratios.hybrid(results))
    return {(PERFORMANCE, "performance"): section(folder), (HYBRID, "hybrid"): hybrid} | {
        (BRANCHES, op): "\n".join(lines) for op, lines in tables_of.items()
    }


if __name__ == "__main__":
    for (page, name), text in blocks().items():
        write_block(page, name, text)
    CHART.write_text(chart(), encoding="utf-8")
    for path in pages.all_results():
        pages.write(results_file.load(path), pages.RESULTS)
