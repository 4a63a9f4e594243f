"""Measure a GPU in eleven minutes: correctness, our kernels, their counters, strong peers, models; the most useful first.

    make gpu MINUTES=11                                     all stages; with fewer minutes, a share of each
    make gpu STAGE="check attention" MINUTES=6 RESULTS=out  these two, whose results are added to those already in out
    python -m benchmarks.gpu --list                         the stages, their seconds and their cases; needs no GPU

It needs PyTorch, Triton, transformers and pytest, and uses other packages if they are installed (docs/building.md). One
deadline holds for everything: a stage that is not done at its place in the schedule is stopped, and what one leaves of its time
the next one may use. RESULTS gets <device>.json, written after every case, <device>.md, <device>.log with all output, profiles
as text, and with matplotlib plots. What did not run is listed by name. If the command is interrupted, all that was measured so
far is kept. A stage that runs again replaces what it measured before.

The exit code is 1 if a test or a memory check fails or an operation gives wrong results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.results import Results, run_stages
from benchmarks.gpu.stages import MINUTES, ROWS, STAGES, Plan, Stage
from benchmarks.harness.machine import device_name, slug
from benchmarks.report import pages, tables
from benchmarks.report.missing import missing

# Use Triton's kernels, in its interpreter, wherever an operation chooses a back end, and no compiler for CPUs.
REHEARSAL = {"TRITON_INTERPRET": "1", "QUIETSTAR_BACKEND": "triton", "TORCHDYNAMO_DISABLE": "1"}
SPARE = 0.25  # minutes before the deadline, for the start of the program, pages and plots


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=[], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, help=f"of these stages together, by default their part of {MINUTES:g}")
    parser.add_argument("--results", type=Path, default=pages.RESULTS, help="folder, default benchmarks/results")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every stage at its smallest on the CPU, to see whether it works"
    )
    parser.add_argument("--list", action="store_true", help="show the stages, their seconds and their cases, and run nothing")
    args = parser.parse_args(argv)
    if not (args.rehearse or args.list or torch.cuda.is_available()):
        sys.exit("make gpu: PyTorch finds no GPU here, so there is nothing to measure.")
    args.results = args.results.resolve()
    if args.rehearse and args.results == pages.RESULTS.resolve():
        parser.error("--rehearse needs --results with another folder, since what it measures is not worth keeping")
    if args.rehearse:
        torch.set_num_threads(2)  # the default of benchmarks.run; the device's name includes them
    usual = sum(minutes for name, (minutes, _) in STAGES.items() if not args.stage or name in args.stage)
    minutes = usual if args.minutes is None else args.minutes
    if minutes <= 2 * SPARE:
        parser.error(f"--minutes must be more than {2 * SPARE:.1f}, got {minutes:g}")
    device = torch.device("cpu" if args.rehearse else "cuda")
    name = f"{slug(device_name(device))}.json" if args.rehearse or torch.cuda.is_available() else "device.json"
    spare = 0.0 if args.list else SPARE
    stages = Plan(args.results / name, MINUTES * (minutes - spare) / usual, args.rehearse).stages(args.stage)
    if args.list:
        return print("\n".join(listed(stages)))
    results = Results(args.results / name, device)
    passed = run_stages(stages, results, REHEARSAL if args.rehearse else None)
    found = results.load()
    page = pages.write(found, args.results)
    print(summary(found))
    print(f"\nWritten: {page}, .json and .log")
    sys.exit(not passed)


def listed(stages: Sequence[Stage]) -> Iterator[str]:
    """What each stage does in which seconds, the cases of its benchmarks and the baselines of each."""
    sys.path.append(str(ROOT / "python"))  # nothing may be installed
    from benchmarks import run

    at, parser = 0.0, run.make_parser()
    for stage in stages:
        yield f"{at:4.0f} s to {at + stage.seconds:3.0f} s  {stage.name}: {STAGES[stage.name][1]}"
        at += stage.seconds
        for name in ROWS:
            if name.partition(",")[0] != stage.name:
                continue
            args = parser.parse_args([*ROWS[name].options, "--device", "cuda"])
            for benchmark, case in run.select(args):
                against = "; ".join(candidate.name for candidate in run.baselines(args, benchmark, case))
                yield f"{'':17}{case}{f', against {against}' if against else ''}"
    yield f"{at:.0f} s together"


def summary(results: dict[str, Any]) -> str:
    """The results that matter most, as Markdown that fits on one page."""
    headline = [row for row in results["rows"] if row["grid"] == "headline" and (row["is_ours"] or _in_gluon(row))]
    lines = ["", f"## {results['machine']['device']}", "", *tables.device_lines(results), ""]
    lines += [*tables.markdown_table(*tables.stage_table(results["stages"])), ""]
    body = [[f"{row['op']}{' in Gluon' * _in_gluon(row)}, {tables.case_of(row)}", *tables.cells(row)[1:]] for row in headline]
    lines += tables.markdown_table(tables.HEADER, body) if body else ["No benchmark has measured anything."]
    return "\n".join([*lines, "", *missing(results)])


def _in_gluon(row: dict[str, Any]) -> bool:
    return bool(row["candidate"].endswith(", Gluon") and row["seconds"])


if __name__ == "__main__":
    main()
