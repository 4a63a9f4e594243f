"""Write the README's performance section, tables of docs/branches.md, and the results pages, from the committed results.

python -m benchmarks.readme
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import goals, pages, ratios, results_file, tables, units
from benchmarks.report.committed import write_block

ROOT = Path(__file__).parents[1]
README, BRANCHES = ROOT / "README.md", ROOT / "docs/branches.md"
SHOWN = ("headline", "Llama 8B, LoRA")  # grids
IN_DOUBT = "Its copy rate is in doubt, so shares of a copy may be too high ([log](docs/log.md))."


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
        f"[{path.name}](benchmarks/results/{path.name})." + (f" {IN_DOUBT}" if results_file.copy_in_doubt(results) else ""),
        "",
    ]
    body = []
    timed = (row for row in results["rows"] if row["grid"] in SHOWN and row["op"] not in tables.WITHOUT_A_ROOFLINE)
    for _, rows in tables.by_case(timed):
        mine = next(row for row in rows if row["is_ours"])
        if mine["seconds"] is not None:
            baselines = [row for row in rows if row["times_ours"] is not None and goals.is_rival(row)]
            faster = "; ".join(f"{row['candidate']} {units.number(row['times_ours'])}" for row in baselines)
            name = "" if mine["grid"] == "headline" else f"{mine['grid']}: "
            case = f"`{mine['op']}` {name}{tables.case_of(mine)}"
            body.append([case, units.seconds(mine["seconds"]), tables.share(mine), faster])
    return "\n".join([*lines, *tables.markdown_table(["", "time", "of the roofline", "times faster than"], body), ""])


def blocks(folder: Path = pages.RESULTS) -> dict[tuple[Path, str], str]:
    """What is written into pages, by page and name of the block."""
    found = [results_file.load(path) for path in pages.all_results(folder)]
    kinds = {"branches": ratios.of_branches, "trees": ratios.of_trees}
    tables_of = {op: [line for results in found for line in ratios.table(results, op, kinds[op])] for op in kinds}
    return {(README, "performance"): section(folder)} | {(BRANCHES, op): "\n".join(lines) for op, lines in tables_of.items()}


if __name__ == "__main__":
    for (page, name), text in blocks().items():
        write_block(page, name, text)
    for path in pages.all_results():
        pages.write(results_file.load(path), pages.RESULTS)
