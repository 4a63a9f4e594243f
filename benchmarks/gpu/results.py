"""Running the stages of a plan, and the results file that they add to."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import judges
from benchmarks.gpu.processes import Log, run_together
from benchmarks.gpu.stages import STAGES, Stage
from benchmarks.harness.machine import describe
from benchmarks.report import pages, results_file, tables
from benchmarks.report.missing import NO_TIME, UNFINISHED

Line = dict[str, Any]  # what one process or step of a stage found
LEAST = 5.0  # seconds; with less left, nothing is started


class Results:
    """The results file, to which the benchmarks themselves write their rows, and the log beside it."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, device
        self.log = Log(path.with_suffix(".log"))

    def load(self) -> dict[str, Any]:
        empty = {"machine": describe(self.device), "ceilings": {}, "command": "make gpu", "rows": []}
        found = results_file.load(self.path) if self.path.exists() else empty
        return found | {"command": "make gpu", "plan": [*STAGES], "stages": found.get("stages", [])}

    def put(self, stage: str, lines: Sequence[Line]) -> None:
        """Replace the lines of a stage, and write the page again."""
        results = self.load()
        others = [line for line in results["stages"] if _stage_of(line) != stage]
        # Lines of a stage that has got another name since are kept, and come last.
        results["stages"] = sorted([*others, *lines], key=lambda line: [*STAGES, _stage_of(line)].index(_stage_of(line)))
        results_file.save(results, self.path)
        results_file.write(pages.page(results), self.path.with_suffix(".md"))


def _stage_of(line: Line) -> str:
    return line["stage"].partition(",")[0]


def run_stages(stages: Sequence[Stage], results: Results, variables: dict[str, str] | None = None) -> bool:
    """Run stages by their schedule, from now on. Returns False if something failed."""
    ends, passed = time.monotonic(), True
    for stage in stages:
        ends += stage.seconds
        passed &= _run_stage(stage, results, ends, variables)
    return passed


def _run_stage(stage: Stage, results: Results, ends: float, variables: dict[str, str] | None) -> bool:
    lines: list[Line] = []
    results.log.add(f"=== {stage.name}, {datetime.datetime.now():%Y-%m-%d %H:%M:%S}")
    print(f"{stage.name}, {max(0.0, ends - time.monotonic()):.0f} s ...", flush=True)
    for step in stage.steps:
        limit = step.part * (ends - time.monotonic())
        commands = step.commands(limit)
        if limit < LEAST:
            outcomes, found = {}, {judges.title_of(name): (None, NO_TIME) for name in commands}
        else:
            results.put(stage.name, [*lines, _line(stage.name, "", None, UNFINISHED, 0.0)])
            outcomes = run_together(stage.name, commands, limit, results.log, variables)
            found = judges.verdicts(outcomes)
        took = max((outcome.seconds for outcome in outcomes.values()), default=0.0)
        for name, (passed, note) in found.items():
            lines.append(_line(stage.name, name, passed, note, outcomes[name].seconds if name in outcomes else took))
            print(f"  {lines[-1]['stage']}: {tables.VERDICTS[passed]} {note}", flush=True)
    results.put(stage.name, lines)
    return all(line["passed"] is not False for line in lines)


def _line(stage: str, name: str, passed: bool | None, note: str, seconds: float) -> Line:
    title = f"{stage}, {name}" if name else stage
    return {"stage": title, "passed": passed, "note": note, "seconds": round(seconds, 1)}
