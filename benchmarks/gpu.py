"""The acceptance of a GPU, in one command and under eight minutes: build, tests, sanitizers, compile times, benchmarks, goals.

    make gpu

Every stage is a process with a time limit of its own. One that fails or is stopped is reported, and the others still run. It
needs PyTorch, Triton, transformers and pytest, and takes in what else is installed: rich, matplotlib, compute-sanitizer,
flash-attn, liger-kernel, cut-cross-entropy, and nvcc with ninja, which compile the CUDA back end into this folder for this GPU.
It writes benchmarks/results/<gpu>.md, .json and, with matplotlib, .png, and ends with a page to paste into an issue. The exit
code is 1 where the build or a test fails or an operation gives wrong results; a missed goal is reported and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "python")]  # where nothing is installed

import torch  # noqa: E402

import goals  # noqa: E402
import report  # noqa: E402
from machine import describe  # noqa: E402

BUDGET = 465  # seconds of all stages together
FIRST_CALL_GOALS = {"forward": 2.0, "forward+backward": 4.0}  # seconds
# Test files with a process of their own; the others share one. What needs no GPU is left out.
TESTS = ("thought_attention", "thought_attention_leaks", "thought_decode", "sample_token", "linear_logprob")
WITHOUT_A_GPU = ("ahead_of_time", "cuda_wheel", "cuda_build_switch")
SANITIZERS, UNWATCHED = ("memcheck", "racecheck"), "small cases, no sanitizer"
# Minutes after which a benchmark starts no new case, and the grids it runs.
BENCHMARKS = {
    "thought_attention": (1.2, ["headline", "text"]),
    "thought_decode": (0.5, ["headline", "text"]),
    "sample_token": (0.3, []),
    "linear_logprob": (0.4, []),
    "step": (0.7, ["Llama 8B, LoRA", "headline"]),
    "naive": (0.3, []),
    "memory": (0.3, []),
}


@dataclass(frozen=True)
class Outcome:
    """What a process left: its exit code, None where it was stopped, its output, and how long it ran."""

    code: int | None
    output: str
    seconds: float

    @property
    def end(self) -> str:
        return "stopped at its time limit" if self.code is None else f"exit code {self.code}"


@dataclass(frozen=True)
class Stage:
    """Processes that run beside each other.

    Attributes:
        commands: by name.
        limit: seconds.
        judge: an outcome to (passed, None where that is no question of right and wrong; what to say).
    """

    name: str
    commands: dict[str, list[str]]
    limit: float
    judge: Callable[[str, Outcome], tuple[bool | None, str]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder for the pages")
    parser.add_argument(
        "--dry-run", action="store_true", help="every stage at its smallest, on the CPU: does the command work?"
    )
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("make gpu: PyTorch finds no GPU here, so there is nothing to measure.")
    if args.dry_run and args.results == report.RESULTS:
        parser.error("--dry-run needs --results with another folder: what it measures is not worth keeping")
    device = torch.device("cpu" if args.dry_run else "cuda")
    with tempfile.TemporaryDirectory() as scratch:
        lines, files = run_stages(stages(device, Path(scratch), args.dry_run), BUDGET)
        results = gather(files, device, lines)
    page = report.write(results, args.results)
    print(summary(results))
    print(f"\nWritten: {page}")
    sys.exit(any(line["passed"] is False for line in lines))


def stages(device: torch.device, scratch: Path, smallest: bool) -> list[Stage]:
    """All stages in order; the files of the benchmarks' rows are ``scratch/<op>.json``."""
    python = [sys.executable]
    here = Path(__file__).parent
    pytest = [*python, "-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider"]
    tests = {name: [*pytest, f"tests/kernels/test_{name}.py"] for name in TESTS}
    files = sorted(file for file in (ROOT / "tests/kernels").glob("test_*.py") if not file.stem.endswith(WITHOUT_A_GPU))
    others = [str(file.relative_to(ROOT)) for file in files if file.stem.removeprefix("test_") not in TESTS]
    tests["others"] = [*pytest, *others]
    if smallest:
        tests = {"layout": [*pytest, "tests/kernels/test_layout.py", "-k", "dense_mask"]}
    cases = [*python, str(here / "small_cases.py"), "--device", device.type]
    if sanitizer := shutil.which("compute-sanitizer"):
        watched = {tool: [sanitizer, "--tool", tool, "--error-exitcode", "9", *cases] for tool in SANITIZERS}
    else:
        watched = {UNWATCHED: cases}
    benchmarks = [
        Stage(
            f"benchmark {op}",
            {op: [*python, str(here / "run.py"), "--op", op, "--json", str(scratch / f"{op}.json"), *options]},
            60 * minutes + 45,
            judge_benchmark,
        )
        for op, (minutes, grids) in BENCHMARKS.items()
        for options in [
            ["--smoke", "--device", device.type, "--ceiling-size", "64"]
            if smallest
            else ["--device", device.type, "--minutes", str(minutes), *(["--grid", *grids] if grids else [])]
        ]
    ]
    first = {what: [*python, str(here / "first_call.py"), what, "--device", device.type] for what in FIRST_CALL_GOALS}
    return [
        *([] if smallest else [Stage("build", {"CUDA back end": build_here()}, 40, judge_build)]),
        Stage("tests", tests | watched, 140, judge_correctness),
        *(Stage(f"first call, {what}", {what: command}, 30, judge_first_call) for what, command in first.items()),
        *benchmarks,
    ]


def build_here() -> list[str]:
    """The command that compiles the CUDA back end into this folder, for this GPU."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    variables = ["QUIETSTAR_BUILD=cuda", f"TORCH_CUDA_ARCH_LIST={capability.replace('9.0', '9.0a')}"]
    return ["env", *variables, sys.executable, "setup.py", "-q", "build_ext", "--inplace"]


def run_stages(found: Sequence[Stage], budget: float) -> tuple[list[dict[str, Any]], list[Path]]:
    """A line for every process, {"stage", "passed", "said", "seconds"}, and the files that benchmarks may have written."""
    deadline = time.monotonic() + budget
    lines, files = [], []
    for stage in found:
        left = deadline - time.monotonic()
        print(f"{stage.name} ...", flush=True)
        outcomes = run_beside(stage.commands, min(stage.limit, left)) if left > 5 else {}
        for name, command in stage.commands.items():
            if "--json" in command:
                files.append(Path(command[command.index("--json") + 1]))
            if name not in outcomes:
                passed, said, seconds = None, "not run: out of time", 0.0
            else:
                (passed, said), seconds = stage.judge(name, outcomes[name]), outcomes[name].seconds
            title = stage.name if len(stage.commands) == 1 else f"{stage.name}, {name}"
            lines.append({"stage": title, "passed": passed, "said": said, "seconds": round(seconds, 1)})
            print(f"  {title}: {_word(passed)} {said}", flush=True)
    return lines, files


def run_beside(commands: dict[str, list[str]], limit: float) -> dict[str, Outcome]:
    """Run all commands at once; what runs longer than ``limit`` seconds is stopped, with all that it started."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    running, outcomes = {}, {}
    with tempfile.TemporaryDirectory() as logs:
        for name, command in commands.items():
            log = (Path(logs) / name).open("w+")
            running[name] = (
                log,
                subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
                ),
            )
        for name, (log, process) in running.items():
            code: int | None
            try:
                code = process.wait(max(0.1, limit - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            log.seek(0)
            outcomes[name] = Outcome(code, log.read(), time.monotonic() - began)
            log.close()
    return outcomes


def judge_build(name: str, outcome: Outcome) -> tuple[bool | None, str]:
    """That nvcc isn't here is no failure; that it doesn't compile is one."""
    if outcome.code == 0:
        return True, "compiled for this GPU"
    last = _last_line(outcome)
    return (None if last.startswith("QUIETSTAR_BUILD=cuda: ") else False), last if outcome.code == 1 else outcome.end


def judge_correctness(name: str, outcome: Outcome) -> tuple[bool | None, str]:
    return (judge_sanitizer if name in (*SANITIZERS, UNWATCHED) else judge_tests)(name, outcome)


def judge_tests(name: str, outcome: Outcome) -> tuple[bool | None, str]:
    words = ("PASSED", "FAILED", "ERROR")
    counts = {word: len(re.findall(rf"^tests/.* {word}", outcome.output, re.MULTILINE)) for word in words}
    said = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count or word == "PASSED")
    broken = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", outcome.output, re.MULTILINE)))
    if broken:
        said += ": " + ", ".join(test.rpartition("::")[2] for test in broken[:3]) + (" ..." if len(broken) > 3 else "")
    if outcome.code is None:
        return (False if counts["FAILED"] or counts["ERROR"] else None), f"{said} before it was {outcome.end}"
    return outcome.code == 0, said if outcome.code in (0, 1) else f"{said}; {outcome.end}: {_last_line(outcome)}"


def judge_sanitizer(name: str, outcome: Outcome) -> tuple[bool | None, str]:
    found = re.findall(r"ERROR SUMMARY: (.*)|RACECHECK SUMMARY: (.*)", outcome.output)
    said = "".join(found[-1]) if found else _last_line(outcome)
    if outcome.code is None:
        return None, outcome.end
    missing = "; compute-sanitizer is not installed here" if name == UNWATCHED else ""
    return outcome.code == 0, said + missing


def judge_first_call(name: str, outcome: Outcome) -> tuple[bool | None, str]:
    if outcome.code != 0:
        return (None if outcome.code is None else False), f"{outcome.end}: {_last_line(outcome)}"
    seconds = json.loads(outcome.output.strip().splitlines()[-1])
    goal = FIRST_CALL_GOALS[name]
    met = "pass" if seconds["first call"] < goal else "miss"
    said = f"{seconds['first call']:.2f} s, goal < {goal:g} s: {met}; another length {seconds['another length']:.2f} s"
    return None, said


def judge_benchmark(name: str, outcome: Outcome) -> tuple[bool | None, str]:
    if outcome.code is None:
        return None, outcome.end
    return outcome.code == 0, "" if outcome.code == 0 else f"{outcome.end}: {_last_line(outcome)}"


def gather(files: Sequence[Path], device: torch.device, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One results file of all that the benchmarks wrote; the ceilings are the highest that one of them measured."""
    ceilings: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for file in files:
        if not file.exists():
            continue
        found = report.load(file)
        rows += found["rows"]
        for name, rate in found["ceilings"].items():
            ceilings[name] = max(rate, ceilings.get(name, 0.0))
    return {"machine": describe(device), "ceilings": ceilings, "command": "make gpu", "stages": lines, "rows": rows}


def summary(results: dict[str, Any]) -> str:
    """One page of Markdown."""
    rows = results["rows"]
    headline = [row for row in rows if row["grid"] == "headline" and row["is_ours"]]
    kind = "cuda"  # the goals are those of a GPU, also where the command is only tried out
    lines = ["", f"## {results['machine']['device']}", "", *report.device_lines(results), ""]
    lines += report.markdown_table(["goal", "target", "reached", "verdict"], report.goal_cells(kind, rows))
    lines += ["", *report.markdown_table(*report.stage_table(results["stages"])), ""]
    body = [[f"{row['op']}, {report.case_of(row)}", *report.cells(row)[1:]] for row in headline]
    lines += report.markdown_table(report.HEADER, body) if body else ["No benchmark left a row."]
    verdicts = [goal.verdict(rows)[2] for goal in goals.of(kind)]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("pass", "miss", "not measured"))
    return "\n".join([*lines, "", f"Goals: {counts}."])


def _word(passed: bool | None) -> str:
    return {True: "ok", False: "FAILED", None: ""}[passed]


def _last_line(outcome: Outcome) -> str:
    lines = outcome.output.strip().splitlines() or ["no output"]
    return lines[-1][:200]


if __name__ == "__main__":
    main()
