"""How ``make gpu`` judges a process by its exit code and output."""

import importlib.util
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.gpu import judges
from benchmarks.gpu.processes import ROOT, Log, Outcome, run_together

FIRST_CALL = '{"first call": %s, "another length": 0.01}'
PYTEST = "tests/a.py::test_a PASSED [ 50%]\ntests/a.py::test_b[x] FAILED [100%]\nFAILED tests/a.py::test_b[x] - assert 1\n"
NVCC = """[1/3] c++ bindings.o
/src/csrc/bindings.cpp:12:5: error: 'STABLE_CHECK' was not declared in this scope
   12 |     STABLE_CHECK(f());
ninja: build stopped: subcommand failed.
The CUDA back end does not compile, the lines above say why; QUIETSTAR_BUILD=python installs without it.
"""


@pytest.mark.parametrize(
    "judge, name, outcome, passed, note",
    [
        (judges.check, "", Outcome(0, "sample_token  cpu  float32  3  ok\nAll is well, 9 s.", 1), True, "All is well"),
        (judges.check, "", Outcome(1, "sample_token  cpu  float32  3  wrong\n2 wrong", 1), False, "2 wrong"),
        (judges.check, "", Outcome(0, "All is well, 0 s.", 1), None, "nothing was checked"),
        (judges.check, "", Outcome(None, "", 1), None, "stopped"),
        (judges.build, "", Outcome(0, "", 1), True, "compiled"),
        (judges.build, "", Outcome(1, "QUIETSTAR_BUILD=cuda: there is no nvcc on PATH.", 1), None, "no nvcc on PATH"),
        (
            judges.build,
            "",
            Outcome(1, NVCC, 1),
            False,
            "bindings.cpp:12:5: error: 'STABLE_CHECK' was not declared in this scope",
        ),
        (judges.build, "", Outcome(1, "Killed", 1), False, "Killed"),
        (judges.build, "", Outcome(None, "", 1), False, "stopped"),
        (judges.small_cases, "small cases", Outcome(0, "all ops", 1), True, "all ops"),
        (judges.small_cases, "small cases", Outcome(1, "Traceback\nBoom", 1), False, "Boom"),
        (judges.sanitizer, "memcheck", Outcome(0, "fine\n== ERROR SUMMARY: 0 errors", 1), True, "0 errors"),
        (judges.sanitizer, "memcheck", Outcome(9, "== ERROR SUMMARY: 3 errors", 1), False, "3 errors"),
        (judges.sanitizer, "memcheck", Outcome(None, "", 1), None, "stopped"),
        (judges.sanitizer, "racecheck", Outcome(9, "== RACECHECK SUMMARY: 7 hazards", 1), None, "7 hazards; not judged"),
        (judges.first_call, "first call, forward", Outcome(0, FIRST_CALL % 1.5, 1), None, "goal < 2 s: pass"),
        (judges.first_call, "first call, forward+backward", Outcome(0, FIRST_CALL % 4.5, 1), None, "goal < 4 s: miss"),
        (judges.first_call, "first call, forward", Outcome(1, "Traceback\nBoom", 1), False, "exit code 1: Boom"),
        (judges.benchmark, "benchmark", Outcome(0, "3 cases", 1), True, "3 cases"),
        (judges.benchmark, "benchmark", Outcome(1, "refused, a wrong result", 1), False, "exit code 1: refused"),
        (judges.warm, "compile ahead", Outcome(1, "Boom", 1), None, "exit code 1: Boom"),
    ],
)
def test_verdict_of_an_outcome(judge, name, outcome, passed, note):
    ((got, got_note),) = judges.each(judge)({name: outcome}).values()
    assert got is passed and note in got_note


@pytest.mark.parametrize(
    "outcomes, passed, note",
    [
        ([Outcome(0, "tests/a.py::test_a PASSED [100%]\n== 1 passed ==", 1)] * 2, True, "2 passed"),
        ([Outcome(0, PYTEST.splitlines()[0], 1), Outcome(1, PYTEST, 1)], False, "2 passed, 1 failed: test_b[x]"),
        ([Outcome(0, "", 1), Outcome(None, PYTEST.splitlines()[0], 1)], None, "1 passed; 1 of 2 processes stopped"),
        ([Outcome(None, "\n".join(PYTEST.splitlines()[:2]), 1)], False, "1 failed: test_b[x]; 1 of 1 processes stopped"),
        ([Outcome(4, "ERROR: file not found", 1)], False, "exit code 4: ERROR: file not found"),
    ],
)
def test_all_shares_of_the_tests_are_judged_together(outcomes, passed, note):
    ((got, got_note),) = judges.tests(dict(enumerate(outcomes))).values()
    assert got is passed and note in got_note


@pytest.mark.long
def test_processes_end_with_all_that_they_started_and_their_output_is_in_the_log(tmp_path, monkeypatch):
    child = tmp_path / "child"
    hang = (
        "import pathlib, subprocess, time; p = subprocess.Popen(['sleep', '60']);"
        f"pathlib.Path({str(child)!r}).write_text(str(p.pid)); print('begun', flush=True); time.sleep(60)"
    )
    monkeypatch.setenv("PYTHONPATH", "/mine")
    works = "import os; print(os.environ['A'], os.environ['PYTHONPATH'].endswith(':/mine'))"
    commands = {"hangs": [sys.executable, "-c", hang], "works": [sys.executable, "-c", works]}
    log = tmp_path / "log"
    log.write_text("before\n")
    outcomes = run_together("stage", commands, 4, Log(log), {"A": "set"})
    assert outcomes["hangs"].code is None and outcomes["hangs"].output == "begun\n"
    assert (outcomes["works"].code, outcomes["works"].last_line) == (0, "set True") and outcomes["works"].seconds < 4
    text = log.read_text()
    assert text.startswith("before\n") and "stage, hangs | begun\n" in text and "stage, works = exit code 0" in text
    status = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("a process that it started still runs")


def test_shares_of_the_tests_are_all_of_them():
    spec = importlib.util.spec_from_file_location("kernels_conftest", ROOT / "tests/kernels/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    shares = []
    for shard in ("0/3", "1/3", "2/3"):
        shares.append(list(range(10)))
        conftest.pytest_collection_modifyitems(mock.Mock(**{"getoption.return_value": shard}), shares[-1])
    assert sorted(sum(shares, [])) == list(range(10)) and all(len(share) >= 3 for share in shares)
