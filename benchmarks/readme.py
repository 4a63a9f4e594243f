"""Write the README's performance section, and the results pages, from the committed results.

python -m benchmarks.readme
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import goals, pages, results_file, tables, units
from benchmarks.report.committed import write_block

README = Path(__file__).parents[1] / "README.md"


def section(folder: Path = pages.RESULTS) -> str:
    """A table of the headline cases for each measured device, and a sentence about what has not been measured."""
    found = [(path, results_file.load(path)) for path in pages.all_results(folder)]
    kinds = {results["machine"]["kind"] for _, results in found}
    parts = [device_section(path, results) for path, results in found]
    for kind, what, command in (("cpu", "CPUs", "make bench"), ("cuda", "GPUs", "make gpu")):
        if kind not in kinds:
            parts.append(f"{what}: not measured. `{command}` measures one and writes its results to benchmarks/results.\n")
    return "\n".join(parts)


def device_section(path: Path, results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(
        f"{name} {machine['packages'][name]}" for name in ("torch", "transformers") if machine["packages"][name]
    )
    lines = [
        f"**{machine['device']}**, {machine['date']}, {packages}; all cases are in "
        f"[{path.name}](benchmarks/results/{path.name}).",
        "",
    ]
    body = []
    timed = (row for row in results["rows"] if row["grid"] == "headline" and row["op"] not in tables.WITHOUT_A_ROOFLINE)
    for _, rows in tables.by_case(timed):
        mine = next(row for row in rows if row["is_ours"])
        if mine["seconds"] is not None:
            baselines = [row for row in rows if row["times_ours"] is not None and goals.is_rival(row)]
            faster = "; ".join(f"{row['candidate']} {units.number(row['times_ours'])}" for row in baselines)
            case = f"`{mine['op']}` {tables.case_of(mine)}"
            body.append([case, units.seconds(mine["seconds"]), units.percent(mine["of_roofline"]), faster])
    return "\n".join([*lines, *tables.markdown_table(["", "time", "of the roofline", "times faster than"], body), ""])


if __name__ == "__main__":
    write_block(README, "performance", section())
    for path in pages.all_results():
        pages.write(results_file.load(path), pages.RESULTS)
