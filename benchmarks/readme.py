"""Write the README's performance section, the results pages and their list from the committed results.

python -m benchmarks.readme
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import goals, pages, results_file, tables, units

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- performance: begin, written by benchmarks/readme.py -->\n", "<!-- performance: end -->\n"


def section(folder: Path = pages.RESULTS) -> str:
    """A table of the headline cases for each measured device, and a sentence about what has not been measured."""
    found = [(path, results_file.load(path)) for path in pages.all_results(folder)]
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
    timed = (row for row in results["rows"] if row["grid"] == "headline" and row["op"] not in tables.WITHOUT_A_FLOOR)
    for _, rows in tables.by_case(timed):
        mine = next(row for row in rows if row["is_ours"])
        if mine["seconds"] is not None:
            peers = [row for row in rows if row["times_ours"] is not None and goals.is_rival(row)]
            faster = "; ".join(f"{row['candidate']} {units.number(row['times_ours'])}" for row in peers)
            case = f"`{mine['op']}` {tables.case_of(mine)}"
            body.append([case, units.seconds(mine["seconds"]), units.percent(mine["of_floor"]), faster])
    return "\n".join([*lines, *tables.markdown_table(["", "time", "of the floor", "times faster than"], body), ""])


def updated(text: str, folder: Path = pages.RESULTS) -> str:
    """The README's text with a new section. Raises ValueError if the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the marks {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}{section(folder)}{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    for path in pages.all_results():
        pages.write(results_file.load(path), pages.RESULTS)
