"""The results pages, ``results/<device>.md``. git ignores them: ``make docs`` makes them from the JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import slug
from benchmarks.report import results_file
from benchmarks.report.missing import missing
from benchmarks.report.tables import HEADER, TITLES, by_case, cells, device_lines, markdown_table, stage_table

RESULTS = Path(__file__).parents[1] / "results"
READING = (
    "Times are medians. All candidates were first checked for equal results, then timed in turn on the same inputs. Useful "
    "work is what the layout makes visible, in FLOP/s, or in bytes/s where memory is the limit. The roofline is the time that "
    "this work takes at the peak rates above. Memory is what a call allocates."
)


def all_results(folder: Path = RESULTS) -> list[Path]:
    return sorted(folder.glob("*.json"))


def page(results: dict[str, Any], plots: Sequence[Path] = ()) -> str:
    """``results/<device>.md``."""
    rows = results["rows"]
    lines = [f"# {results['machine']['device']}", "", *device_lines(results), ""]
    lines += [f"Measured by `{results['command']}`. {READING}", ""]
    if "stages" in results:
        lines += ["## Stages", "", *markdown_table(*stage_table(results["stages"])), ""]
        lines += ["## Missing", "", *(f"- {line}" for line in missing(results) or ["Nothing."]), ""]
    for plot in plots:
        lines += [f"![{plot.stem}]({plot.name})", ""]
    for op, title in TITLES.items():
        mine = [row for row in rows if row["op"] == op]
        if mine:
            lines += [f"## {title} (`{op}`)", ""]
        for case, group in by_case(mine):
            lines += [f"**{case}**", "", *markdown_table(HEADER, [cells(row) for row in group]), ""]
    return "\n".join(lines)


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write the JSON file, its plots if matplotlib is installed, and the page. Returns the page's path."""
    path = folder / f"{slug(results['machine']['device'])}.md"
    results_file.save(results, path.with_suffix(".json"))
    try:
        from benchmarks.report.plots import draw
    except ImportError:
        drawn: list[Path] = []
    else:
        drawn = draw(results, folder, path.stem)
    results_file.write(page(results, drawn), path)
    return path
