"""``make gpu`` without a GPU: stages alone and together, what a kill leaves, and several runs into one folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import command
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import judges
from benchmarks.gpu import results as gpu_results
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.results import Results, run_stage
from benchmarks.gpu.stages import LIMIT, WITHOUT_A_GPU, Plan, Stage, Step
from benchmarks.report import results_file
from benchmarks.report.missing import STAGES, UNFINISHED, missing
from benchmarks.run import BENCHMARKS

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
RUN = [sys.executable, "-m", "benchmarks.run", "--smoke", "--device", "cpu", "--ceiling-size", "64"]


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "device.json", CPU)


def benchmark(results, *ops):
    command = [*RUN, "--ours-first", "--op", *ops, "--json", str(results.path)]
    return Step({"benchmark": command}, 120, judges.each(judges.benchmark))


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="make gpu: PyTorch finds no GPU here, so there is nothing to measure."):
        gpu.main([])


DRIVER = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import judges
from benchmarks.gpu.results import Results, run_stage
from benchmarks.gpu.stages import Stage, Step
path, *command = sys.argv[1:]
step = Step({"benchmark": command}, 120, judges.each(judges.benchmark))
run_stage(Stage("step", [step]), Results(Path(path), torch.device("cpu")))
"""


def test_a_kill_loses_the_case_in_progress_and_no_other(results):
    """SIGKILL the command's process group while a benchmark runs, then run another stage into the same folder."""
    step = benchmark(results, "sample_token", "linear_logprob", "step")
    driver = [sys.executable, "-c", DRIVER, str(results.path), *step.commands["benchmark"]]
    driven = subprocess.Popen(driver, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)

    def measured():
        return [row for row in results.load()["rows"] if row["seconds"]]

    wait(measured)
    children = [int(x) for x in Path(f"/proc/{driven.pid}/task/{driven.pid}/children").read_text().split()]
    os.killpg(driven.pid, signal.SIGKILL)
    driven.wait()
    found = results.load()
    rows = measured()
    assert 0 < len(rows) < len(found["rows"]) and any(row["note"] == results_file.NOT_REACHED for row in found["rows"])
    assert [(line["stage"], line["note"]) for line in found["stages"]] == [("step", UNFINISHED)]
    assert "step, benchmark | " in results.path.with_suffix(".log").read_text()
    assert results.path.with_suffix(".md").read_text().startswith("# ")
    assert children and wait(lambda: all(map(stopped, children)))

    assert run_stage(Stage("naive", [benchmark(results, "naive")]), results)
    after = results.load()
    assert [row for row in after["rows"] if row["op"] == rows[0]["op"]][0] == rows[0]
    assert {row["op"] for row in after["rows"] if row["seconds"]} == {row["op"] for row in rows} | {"naive"}
    assert "Stopped: step." in missing(after) and any(line.startswith("Cases not reached: ") for line in missing(after))


def wait(condition):
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("not within a minute")


def stopped(process):
    """A zombie that its parent has not waited for counts as stopped."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().split()[2] == "Z"


def test_a_stage_that_runs_again_replaces_its_lines_and_a_failed_step_does_not_stop_the_next(results):
    def stage(name, first):
        python = [sys.executable, "-c"]
        steps = [("a", first), ("b", "print('fine')")]
        return Stage(name, [Step({key: [*python, code]}, 60, judges.each(judges.small_cases)) for key, code in steps])

    assert run_stage(stage("sanitize", "print(1)"), results)
    assert not run_stage(stage("decode", "raise SystemExit('boom')"), results)

    def lines():
        return [(line["stage"], line["passed"], line["note"]) for line in results.load()["stages"]]

    others = [("sanitize, a", True, "1"), ("sanitize, b", True, "fine")]
    assert lines() == [("decode, a", False, "boom"), ("decode, b", True, "fine"), *others]
    assert run_stage(stage("decode", "print(2)"), results)
    assert lines() == [("decode, a", True, "2"), ("decode, b", True, "fine"), *others]


def test_a_stage_ends_at_its_limit(results, monkeypatch):
    monkeypatch.setattr(gpu_results, "LIMIT", 3)
    sleep = Step({"a": [sys.executable, "-c", "import time; time.sleep(60)"]}, 60, judges.each(judges.small_cases))
    began = time.monotonic()
    assert run_stage(Stage("head", [sleep, sleep]), results)
    assert time.monotonic() - began < 20
    assert [line["note"] for line in results.load()["stages"]] == ["stopped at its time limit"] * 2


def test_the_real_stages(tmp_path):
    """They are in the order of their worth, take less than four minutes each, and name files and options that exist."""
    plan = Plan(tmp_path / "a.json")
    found = {stage.name: stage.steps for stage in plan.stages()}
    assert list(found) == list(STAGES) and [stage.name for stage in plan.stages(["head", "check"])] == ["check", "head"]
    order = ("check", "tests", "attention", "decode", "head", "step", "naive", "sanitize")
    assert [name for name in found if name in order] == [*order]
    assert LIMIT < 240
    for name, steps in found.items():
        assert sum(step.limit for step in steps) <= LIMIT, name
    timed = [step.commands["benchmark"] for steps in found.values() for step in steps if "benchmark" in step.commands]
    parser = command.make_parser([*BENCHMARKS.values()], "")
    parsed = [command.parse(parser, [x if x != "cuda" else "cpu" for x in words[3:]]) for words in timed]
    assert sorted(op for args in parsed for op in args.op) == sorted(BENCHMARKS)
    assert all(args.ours_first and args.json == plan.results and args.minutes <= 1.7 for args in parsed)
    (tests,) = found["tests"]
    assert len(tests.commands) == min(16, os.cpu_count())
    files = [word for word in tests.commands[f"1 of {len(tests.commands)}"] if word.startswith("tests/")]
    assert files[0] == "tests/kernels/test_thought_attention.py" and len(files) == len({*files})
    missing = {f"tests/kernels/{path.name}" for path in (ROOT / "tests/kernels").glob("test_*.py")} - {*files}
    assert missing == {f"tests/kernels/test_{name}.py" for name in WITHOUT_A_GPU}
    (build,) = found["build"]
    assert "QUIETSTAR_BUILD=cuda" in build.commands[""] and (ROOT / "setup.py").exists()
