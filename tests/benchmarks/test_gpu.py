"""``make gpu`` without a GPU: stages by their schedule, what a kill leaves, and several runs into one folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.processes import ROOT, STOPPED
from benchmarks.gpu.results import Results, run_stages
from benchmarks.gpu.stages import Stage, Step
from benchmarks.report import results_file
from benchmarks.report.missing import NO_TIME, UNFINISHED, missing

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
RUN = [sys.executable, "-m", "benchmarks.run", "--smoke", "--device", "cpu", "--ceiling-size", "64"]


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "device.json", CPU)


def step(**commands):
    return Step(lambda seconds: commands)


def python(code):
    return [sys.executable, "-c", code]


def benchmark(results, *ops):
    return step(benchmark=[*RUN, "--op", *ops, "--json", str(results.path)])


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="make gpu: PyTorch finds no GPU here, so there is nothing to measure."):
        gpu.main([])


DRIVER = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu.results import Results, run_stages
from benchmarks.gpu.stages import Stage, Step
path, *command = sys.argv[1:]
stage = Stage("step", 120, [Step(lambda seconds: {"benchmark": command})])
run_stages([stage], Results(Path(path), torch.device("cpu")))
"""


def test_a_kill_loses_the_case_in_progress_and_no_other(results):
    """SIGKILL the command's process group while a benchmark runs, then run another stage into the same folder."""
    words = benchmark(results, "sample_token", "linear_logprob", "step").commands(120)["benchmark"]
    driver = [*python(DRIVER), str(results.path), *words]
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

    assert run_stages([Stage("rollout", 120, [benchmark(results, "naive")])], results)
    after = results.load()
    kept = next(row for row in after["rows"] if row["op"] == rows[0]["op"])
    assert kept == results_file.under(after["ceilings"], rows[0])
    assert {row["op"] for row in after["rows"] if row["seconds"]} == {row["op"] for row in rows} | {"naive"}
    found = missing(after)
    assert "Stopped: step." in found and any(line.startswith("Not run: check; sanitize; ") for line in found)
    late = next(line for line in found if line.startswith("Cases not reached: "))
    assert "; step training step, B 1 L 6" in late and "naive" not in late


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


def lines(results):
    return [(line["stage"], line["passed"], line["note"]) for line in results.load()["stages"]]


def test_a_stage_that_runs_again_replaces_its_lines_and_a_failed_step_does_not_stop_the_next(results):
    def run(name, first):
        return run_stages([Stage(name, 60, [step(a=python(first)), step(b=python("print('fine')"))])], results)

    results.put("since renamed", [{"stage": "since renamed", "passed": True, "note": "kept", "seconds": 1.0}])
    assert run("tests", "print(1)")
    assert not run("sanitize", "raise SystemExit('boom')")
    others = [("tests, a", True, "1"), ("tests, b", True, "fine"), ("since renamed", True, "kept")]
    assert lines(results) == [("sanitize, a", False, "exit code 1: boom"), ("sanitize, b", True, "fine"), *others]
    assert run("sanitize", "print(2)")
    assert lines(results) == [("sanitize, a", True, "2"), ("sanitize, b", True, "fine"), *others]


def test_a_stage_ends_at_its_place_in_the_schedule(results, monkeypatch):
    """One that is stopped takes nothing of the next; what one leaves, the next may use; without time, nothing is started."""
    monkeypatch.setattr("benchmarks.gpu.results.LEAST", 0.5)
    hang, quick, seen = step(a=python("import time; time.sleep(60)")), step(a=python("print('quick')")), []

    def late(seconds):
        seen.append(seconds)
        return {"a": python("print('late')")}

    stages = [Stage("check", 3, [hang, quick]), Stage("sanitize", 5, [quick]), Stage("peers", 3, [Step(late)])]
    began = time.monotonic()
    assert run_stages(stages, results)
    assert time.monotonic() - began < 11 and 3 < seen[0] < 8
    assert lines(results) == [
        ("check, a", None, STOPPED), ("check, a", None, NO_TIME), ("sanitize, a", True, "quick"), ("peers, a", True, "late"),
    ]  # fmt: skip
    found = missing(results.load())
    assert "Stopped: check, a." in found and any(
        line.startswith("Not run: hybrid; attention; ") and "; check, a." in line for line in found
    )
