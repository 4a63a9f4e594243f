"""What docs/ has of this example: the numbers, the plots, and the table in results.md."""

from __future__ import annotations

import sys
from pathlib import Path

from sums.plots import draw
from sums.report import machine
from sums.results import Results, rounded
from sums.tables import as_markdown, main_table

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.report.committed import as_json, write_block  # noqa: E402, which is not installed


def write_docs(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digit_sums.json").write_text(as_json(rounded(results)), encoding="utf-8")
    draw(results, folder)
    write_block(folder / "results.md", "digit-sums", block(results))


def block(results: Results) -> str:
    return f"{as_markdown(*main_table(results))}\n\nAll numbers are from [digit_sums.json](digit_sums.json): {machine(results)}"
