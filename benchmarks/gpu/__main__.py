"""Test and measure a GPU: correctness, build, tests, benchmarks against baselines and goals, sanitizers.

    make gpu                                      all stages, the most useful first
    make gpu STAGE="tests attention" RESULTS=out  these two, whose results are added to those already in out

It needs PyTorch, Triton, transformers and pytest, and uses other packages if they are installed (docs/building.md). Each stage
takes less than four minutes: a process that runs longer is stopped and reported, and the next one starts. RESULTS gets
<device>.json, written after every case, <device>.md, <device>.log with all output, and with matplotlib plots. If the command is
interrupted, everything measured so far is kept. A stage that runs again replaces what it measured before.

The exit code is 1 if the build, a test or a memory check fails or an operation gives wrong results. A missed goal is reported,
but it is not a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.results import Results, run_stage
from benchmarks.gpu.stages import Plan
from benchmarks.harness.machine import device_name, slug
from benchmarks.report import goals, pages, tables
from benchmarks.report.missing import STAGES, missing

# Use Triton's kernels, in its interpreter, wherever an operation chooses a back end, and no compiler for CPUs.
REHEARSAL = {"TRITON_INTERPRET": "1", "QUIETSTAR_BACKEND": "triton", "TORCHDYNAMO_DISABLE": "1"}
PATIENCE = 4  # factor on the limits of a rehearsal, which runs in an interpreter on a machine that may be busy


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=[], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--results", type=Path, default=pages.RESULTS, help="folder, default benchmarks/results")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every stage at its smallest on the CPU, to see whether it works"
    )
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("make gpu: PyTorch finds no GPU here, so there is nothing to measure.")
    args.results = args.results.resolve()
    if args.rehearse and args.results == pages.RESULTS.resolve():
        parser.error("--rehearse needs --results with another folder, since what it measures is not worth keeping")
    if args.rehearse:
        torch.set_num_threads(2)  # the default of benchmarks.run; the device's name includes them
    device = torch.device("cpu" if args.rehearse else "cuda")
    results = Results(args.results / f"{slug(device_name(device))}.json", device)
    plan = Plan(results.path, args.rehearse)
    how = {"variables": REHEARSAL, "patience": PATIENCE} if args.rehearse else {}
    passed = [run_stage(stage, results, **how) for stage in plan.stages(args.stage)]
    found = results.load()
    page = pages.write(found, args.results)
    print(summary(found))
    print(f"\nWritten: {page}, .json and .log")
    sys.exit(not all(passed))


def summary(results: dict[str, Any]) -> str:
    """The results that matter most, as Markdown that fits on one page."""
    rows = results["rows"]
    headline = [row for row in rows if row["grid"] == "headline" and row["is_ours"]]
    kind = "cuda"  # a rehearsal shows a GPU's goals too
    lines = ["", f"## {results['machine']['device']}", "", *tables.device_lines(results), ""]
    lines += tables.markdown_table(["goal", "target", "reached", "verdict"], tables.goal_cells(kind, rows))
    lines += ["", *tables.markdown_table(*tables.stage_table(results["stages"])), ""]
    body = [[f"{row['op']}, {tables.case_of(row)}", *tables.cells(row)[1:]] for row in headline]
    lines += tables.markdown_table(tables.HEADER, body) if body else ["No benchmark has measured anything."]
    verdicts = [goal.verdict(rows)[2] for goal in goals.of(kind)]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("pass", "miss", "not measured"))
    return "\n".join([*lines, "", f"Goals: {counts}.", *missing(results)])


if __name__ == "__main__":
    main()
