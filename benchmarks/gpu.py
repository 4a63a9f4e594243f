"""The acceptance of a GPU: correctness, build, tests, benchmarks against their peers and goals, sanitizers.

    make gpu                                      all stages, the most useful first
    make gpu STAGE="tests attention" RESULTS=out  these, their results beside what out holds already

It needs PyTorch, Triton, transformers and pytest, and uses what else is installed (docs/gpu.md). Every stage takes less
than four minutes: what runs longer is stopped and reported, and the others still run. RESULTS gets <device>.json, written after
every case, <device>.md, <device>.log with every line that a process wrote, and with matplotlib pictures. Whatever ends this
command, what was measured until then stays, and a stage that runs again replaces what it measured before.

The exit code is 1 where the build, a test or a memory check fails or an operation gives wrong results; a missed goal is
reported and is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "python")]  # where nothing is installed

import torch  # noqa: E402

import goals  # noqa: E402
import report  # noqa: E402
import results_file  # noqa: E402
from gpu_stages import LIMIT, Plan, Stage  # noqa: E402
from machine import describe, device_name, slug  # noqa: E402
from missing import STAGES, UNFINISHED, missing  # noqa: E402
from processes import Log, run_beside  # noqa: E402

Line = dict[str, Any]
# Triton's kernels in its interpreter, wherever an operation chooses a back end itself; and no compiler for CPUs.
REHEARSAL = {"TRITON_INTERPRET": "1", "QUIETSTAR_BACKEND": "triton", "TORCHDYNAMO_DISABLE": "1"}
PATIENCE = 4  # times the limits: an interpreter, on a machine that does other things beside


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=[], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder, default benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="every stage at its smallest, on the CPU: does it work?")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("make gpu: PyTorch finds no GPU here, so there is nothing to measure.")
    args.results = args.results.resolve()
    if args.rehearse and args.results == report.RESULTS.resolve():
        parser.error("--rehearse needs --results with another folder: what it measures is not worth keeping")
    if args.rehearse:
        torch.set_num_threads(2)  # as in run.py: the device's name has them
    device = torch.device("cpu" if args.rehearse else "cuda")
    results = Results(args.results / f"{slug(device_name(device))}.json", device)
    plan = Plan(results.path, args.rehearse)
    how = {"variables": REHEARSAL, "patience": PATIENCE} if args.rehearse else {}
    passed = [run_stage(stage, results, **how) for stage in plan.stages(args.stage)]
    found = results.load()
    page = report.write_page(found, args.results)
    if args.results == report.RESULTS.resolve():
        results_file.write(report.index(), report.RESULTS / "README.md")
    print(summary(found))
    print(f"\nWritten: {page}, .json and .log")
    sys.exit(not all(passed))


class Results:
    """The results file between benchmarks, which write their rows to it themselves; and the log beside it."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, device
        self.log = Log(path.with_suffix(".log"))

    def load(self) -> dict[str, Any]:
        empty = {"machine": describe(self.device), "ceilings": {}, "command": "make gpu", "rows": []}
        found = results_file.load(self.path) if self.path.exists() else empty
        return found | {"command": "make gpu", "stages": found.get("stages", [])}

    def put(self, stage: str, lines: Sequence[Line]) -> None:
        """These lines in place of the stage's, and the page anew."""
        results = self.load()
        others = [line for line in results["stages"] if _stage_of(line) != stage]
        results["stages"] = sorted([*others, *lines], key=lambda line: STAGES.index(_stage_of(line)))
        results_file.save(results, self.path)
        results_file.write(report.page(results), self.path.with_suffix(".md"))


def _stage_of(line: Line) -> str:
    return line["stage"].partition(",")[0]


def run_stage(stage: Stage, results: Results, variables: dict[str, str] | None = None, patience: float = 1.0) -> bool:
    """Run its steps, each for as long as it may, times ``patience``; False where something failed."""
    deadline = time.monotonic() + patience * LIMIT
    lines: list[Line] = []
    results.log.add(f"=== {stage.name}, {datetime.datetime.now():%Y-%m-%d %H:%M:%S}")
    print(f"{stage.name} ...", flush=True)
    for step in stage.steps:
        results.put(stage.name, [*lines, _line(stage.name, "", None, UNFINISHED, 0.0)])
        limit = min(patience * step.limit, deadline - time.monotonic())
        outcomes = run_beside(stage.name, step.commands, limit, results.log, variables)
        took = max(outcome.seconds for outcome in outcomes.values())
        for name, (passed, said) in step.judge(outcomes).items():
            lines.append(_line(stage.name, name, passed, said, outcomes[name].seconds if name in outcomes else took))
            print(f"  {lines[-1]['stage']}: {report.VERDICTS[passed]} {said}", flush=True)
    results.put(stage.name, lines)
    return all(line["passed"] is not False for line in lines)


def _line(stage: str, name: str, passed: bool | None, said: str, seconds: float) -> Line:
    title = f"{stage}, {name}" if name else stage
    return {"stage": title, "passed": passed, "said": said, "seconds": round(seconds, 1)}


def summary(results: dict[str, Any]) -> str:
    """One page of Markdown."""
    rows = results["rows"]
    headline = [row for row in rows if row["grid"] == "headline" and row["is_ours"]]
    kind = "cuda"  # the goals are those of a GPU, also in a rehearsal
    lines = ["", f"## {results['machine']['device']}", "", *report.device_lines(results), ""]
    lines += report.markdown_table(["goal", "target", "reached", "verdict"], report.goal_cells(kind, rows))
    lines += ["", *report.markdown_table(*report.stage_table(results["stages"])), ""]
    body = [[f"{row['op']}, {report.case_of(row)}", *report.cells(row)[1:]] for row in headline]
    lines += report.markdown_table(report.HEADER, body) if body else ["No benchmark left a row."]
    verdicts = [goal.verdict(rows)[2] for goal in goals.of(kind)]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("pass", "miss", "not measured"))
    return "\n".join([*lines, "", f"Goals: {counts}.", *missing(results)])


if __name__ == "__main__":
    main()
