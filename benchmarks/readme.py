"""Writes the README's performance section and the list of pages from the committed results.

python benchmarks/readme.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import goals
import report
import units

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- performance: begin, written by benchmarks/readme.py -->\n", "<!-- performance: end -->\n"


def section(folder: Path = report.RESULTS) -> str:
    """A table for every measured device, of the headline cases; in a sentence what isn't measured."""
    found = [(path, report.load(path)) for path in report.all_results(folder)]
    kinds = {results["machine"]["kind"] for _, results in found}
    parts = [device_section(path, results) for path, results in found]
    for kind, what, command in (("cpu", "CPUs", "make bench"), ("cuda", "GPUs", "make gpu")):
        if kind not in kinds:
            parts.append(f"{what}: not measured. `{command}` measures one and writes its page to benchmarks/results.\n")
    return "\n".join(parts)


def device_section(path: Path, results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(
        f"{name} {machine['packages'][name]}" for name in ("torch", "transformers") if machine["packages"][name]
    )
    lines = [
        f"**{machine['device']}**, {machine['date']}, {packages}. All cases, peers and plots are on "
        f"[its page](benchmarks/results/{path.stem}.md).",
        "",
    ]
    body = []
    timed = (row for row in results["rows"] if row["grid"] == "headline" and row["op"] not in report.WITHOUT_A_FLOOR)
    for _, rows in report.by_case(timed):
        mine = next(row for row in rows if row["is_ours"])
        if mine["seconds"] is not None:
            peers = [row for row in rows if row["times_ours"] is not None and goals.is_rival(row)]
            faster = "; ".join(f"{row['candidate']} {units.number(row['times_ours'])}" for row in peers)
            case = f"`{mine['op']}` {report.case_of(mine)}"
            body.append([case, units.seconds(mine["seconds"]), units.percent(mine["of_floor"]), faster])
    return "\n".join([*lines, *report.markdown_table(["", "time", "of the floor", "times faster than"], body), ""])


def updated(text: str, folder: Path = report.RESULTS) -> str:
    """The README's text with a fresh section. Raises ValueError where the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: the marks {BEGIN.strip()} and {END.strip()} must be there")
    return f"{before}{BEGIN}{section(folder)}{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    (report.RESULTS / "README.md").write_text(report.index())
