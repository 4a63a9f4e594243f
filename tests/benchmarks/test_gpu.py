"""``make gpu`` without a GPU: its stages at their smallest on the CPU, what it makes of failures, and what it says here."""

import sys
import time
from pathlib import Path

import pytest
import torch

import gpu
import report
from gpu import Outcome, Stage


def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert stop.value.code == "make gpu: PyTorch finds no GPU here, so there is nothing to measure."


def test_a_dry_run_never_writes_among_the_results(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run"])
    assert "--dry-run needs --results" in capsys.readouterr().err


def test_dry_run(tmp_path, capsys, monkeypatch):
    """Tests, small cases, first calls and two benchmarks; the others are the same command with another op."""
    for op in ("thought_attention", "thought_decode", "linear_logprob", "step", "memory"):
        monkeypatch.delitem(gpu.BENCHMARKS, op)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--dry-run", "--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert not stop.value.code, said
    (path,) = report.all_results(tmp_path)
    results = report.load(path)
    assert {row["op"] for row in results["rows"]} == {"sample_token", "naive"}
    assert [line["stage"] for line in results["stages"]][-2:] == ["benchmark sample_token", "benchmark naive"]
    assert all(line["passed"] is not False for line in results["stages"])
    tests = results["stages"][0]
    assert tests["passed"] and int(tests["said"].split()[0]) > 0
    assert "first call, forward+backward" in said and "goal < 4 s" in said
    page = said[said.index("\n## ") :]
    assert len(page.splitlines()) < 60 and page.count("not measured") >= 10 and "| sample_token, forward, R 256" in page
    assert "## Stages" in path.with_suffix(".md").read_text()


def test_the_real_stages_name_files_and_grids_that_exist(tmp_path):
    import run

    found = gpu.stages(torch.device("cuda"), tmp_path, smallest=False)
    tests_and_compiles = sum(stage.limit for stage in found if not stage.name.startswith("benchmark"))
    assert tests_and_compiles + 60 * sum(minutes for minutes, _ in gpu.BENCHMARKS.values()) < gpu.BUDGET < 8 * 60
    tests = next(stage for stage in found if stage.name == "tests")
    for name in gpu.TESTS:
        assert (gpu.ROOT / tests.commands[name][-1]).exists()
    others = [Path(word).stem for word in tests.commands["others"] if word.endswith(".py")]
    assert "test_cuda_library" in others and not {"test_ahead_of_time", "test_cuda_wheel"} & {*others}
    build = next(stage for stage in found if stage.name == "build").commands["CUDA back end"]
    assert "QUIETSTAR_BUILD=cuda" in build and (gpu.ROOT / build[build.index(sys.executable) + 1]).exists()
    for op, (_, grids) in gpu.BENCHMARKS.items():
        assert set(grids) <= {case.grid for case in run.MODULES[op].cases(torch.device("cuda"), full=False)}
    assert {stage.name.removeprefix("benchmark ") for stage in found if stage.name.startswith("benchmark")} == set(run.MODULES)


def test_a_stage_that_hangs_or_fails_does_not_stop_the_others(tmp_path):
    python = [sys.executable, "-c"]
    child = tmp_path / "child"
    hang = (
        "import pathlib, subprocess, time; p = subprocess.Popen(['sleep', '60']);"
        f"pathlib.Path({str(child)!r}).write_text(str(p.pid)); time.sleep(60)"
    )
    judge = gpu.judge_benchmark
    found = [
        Stage("hangs", {"a": [*python, hang]}, 3, judge),
        Stage("fails", {"b": [*python, "raise SystemExit('boom')"]}, 20, judge),
        Stage("works", {"c": [*python, "print(1)"]}, 20, judge),
    ]
    began = time.monotonic()
    lines, _ = gpu.run_stages(found, budget=60)
    assert time.monotonic() - began < 30
    assert [(line["stage"], line["passed"], line["said"]) for line in lines] == [
        ("hangs", None, "stopped at its time limit"),
        ("fails", False, "exit code 1: boom"),
        ("works", True, ""),
    ]
    assert stopped(int(child.read_text()))  # and so is what it had started


def stopped(process):
    """Within five seconds; a zombie that waits for its parent's look is stopped too."""
    for _ in range(50):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_the_budget_of_all_stages_holds():
    sleep = Stage("sleeps", {"a": [sys.executable, "-c", "import time; time.sleep(30)"]}, 30, gpu.judge_benchmark)
    lines, _ = gpu.run_stages([sleep, sleep], budget=6)
    assert [line["said"] for line in lines] == ["stopped at its time limit", "not run: out of time"]


FIRST_CALL = '{"first call": %s, "another length": 0.01}'
PYTEST = "tests/a.py::test_a PASSED [ 50%]\ntests/a.py::test_b[x] FAILED [100%]\nFAILED tests/a.py::test_b[x] - assert 1\n"


@pytest.mark.parametrize(
    "judge, name, outcome, passed, said",
    [
        (gpu.judge_build, "a", Outcome(0, "", 1), True, "compiled"),
        (gpu.judge_build, "a", Outcome(1, "QUIETSTAR_BUILD=cuda: there is no nvcc on PATH.", 1), None, "no nvcc on PATH"),
        (gpu.judge_build, "a", Outcome(1, "error\nThe CUDA back end does not compile", 1), False, "does not compile"),
        (gpu.judge_build, "a", Outcome(None, "", 1), False, "stopped"),
        (gpu.judge_tests, "a", Outcome(0, "tests/a.py::test_a PASSED [100%]\n== 1 passed ==", 1), True, "1 passed"),
        (gpu.judge_tests, "a", Outcome(1, PYTEST, 1), False, "1 passed, 1 failed: test_b[x]"),
        (
            gpu.judge_tests,
            "a",
            Outcome(None, PYTEST.splitlines()[0], 1),
            None,
            "1 passed before it was stopped at its time limit",
        ),
        (gpu.judge_tests, "a", Outcome(None, PYTEST, 1), False, "1 failed: test_b[x] before it was stopped"),
        (gpu.judge_tests, "a", Outcome(4, "ERROR: file not found", 1), False, "exit code 4: ERROR: file not found"),
        (gpu.judge_sanitizer, "memcheck", Outcome(0, "fine\n== ERROR SUMMARY: 0 errors", 1), True, "0 errors"),
        (gpu.judge_sanitizer, "memcheck", Outcome(9, "== ERROR SUMMARY: 3 errors", 1), False, "3 errors"),
        (gpu.judge_sanitizer, "racecheck", Outcome(None, "", 1), None, "stopped"),
        (gpu.judge_sanitizer, gpu.UNWATCHED, Outcome(0, "all ops", 1), True, "not installed here"),
        (
            gpu.judge_first_call,
            "forward",
            Outcome(0, FIRST_CALL % 1.5, 1),
            None,
            "goal < 2 s: pass",
        ),
        (
            gpu.judge_first_call,
            "forward",
            Outcome(0, FIRST_CALL % 2.5, 1),
            None,
            "goal < 2 s: miss",
        ),
        (gpu.judge_first_call, "forward", Outcome(1, "Traceback\nBoom", 1), False, "exit code 1: Boom"),
    ],
)
def test_what_is_made_of_an_outcome(judge, name, outcome, passed, said):
    got = judge(name, outcome)
    assert got[0] is passed and said in got[1]
