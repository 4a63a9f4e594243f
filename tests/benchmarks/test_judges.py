"""How ``make gpu`` judges a process by its exit code and output."""

import importlib.util
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.gpu import judges
from benchmarks.gpu.processes import ROOT, Log, Outcome, run_together

PYTEST = "tests/a.py::test_a PASSED [ 50%]\ntests/a.py::test_b[x] FAILED [100%]\nFAILED tests/a.py::test_b[x] - assert 1\n"


@pytest.mark.parametrize(
    "name, outcome, passed, note",
    [
        ("check", Outcome(0, "sample_token  cpu  float32  3  ok\nAll is well, 9 s.", 1), True, "All is well"),
        ("check", Outcome(1, "sample_token  cpu  float32  3  wrong\n2 wrong", 1), False, "2 wrong"),
        ("check", Outcome(0, "All is well, 0 s.", 1), None, "nothing was checked"),
        ("check", Outcome(None, "", 1), None, "stopped"),
        ("small cases", Outcome(0, "all ops", 1), True, "all ops"),
        ("small cases", Outcome(1, "Traceback\nBoom", 1), False, "exit code 1: Boom"),
        ("memcheck", Outcome(0, "fine\n== ERROR SUMMARY: 0 errors", 1), True, "0 errors"),
        ("synccheck", Outcome(9, "== ERROR SUMMARY: 3 errors", 1), False, "3 errors"),
        ("memcheck", Outcome(1, "========= Error: Device not supported\nx", 1), None, "does not support this device"),
        ("memcheck", Outcome(1, "Traceback\nBoom", 1), False, "exit code 1: Boom"),
        ("memcheck", Outcome(None, "", 1), None, "stopped"),
        ("Gluon", Outcome(0, "attention in Gluon", 1), True, "attention in Gluon"),
        ("Gluon", Outcome(1, "2 cases FAILED", 1), False, "exit code 1: 2 cases FAILED"),
        ("memcheck, Gluon", Outcome(0, "Gluon's do not run here: a reason\n== ERROR SUMMARY: 0 errors", 1), None, "a reason"),
        ("synccheck, Gluon", Outcome(9, "== ERROR SUMMARY: 3 errors", 1), False, "3 errors"),
        ("benchmark", Outcome(0, "3 cases", 1), True, "3 cases"),
        ("benchmark", Outcome(1, "refused, a wrong result", 1), False, "exit code 1: refused"),
        ("benchmark", Outcome(None, "one case", 1), None, "stopped"),
        ("compile ahead", Outcome(1, "Boom", 1), None, "exit code 1: Boom"),
        ("compile ahead", Outcome(0, "3 candidates called, 1 failed, in 5 s\nx", 1), None, "3 candidates called, 1 failed"),
        ("counters", Outcome(0, "ncu is not on PATH", 1), None, "ncu is not on PATH"),
        ("kernels", Outcome(1, "Boom", 1), None, "exit code 1: Boom"),
        ("device", Outcome(0, "warning\n" + 300 * "x", 1), None, 300 * "x"),
        ("device", Outcome(1, "Boom", 1), False, "Boom"),
    ],
)
def test_verdict_of_an_outcome(name, outcome, passed, note):
    ((got, got_note),) = judges.verdicts({name: outcome}).values()
    assert got is passed and note in got_note


FILES = ("python", "tests/a.py", "tests/late.py", "-k", "x")


@pytest.mark.parametrize(
    "outcomes, passed, note",
    [
        ([Outcome(0, "tests/a.py::test_a PASSED [100%]\n== 1 passed ==", 1)] * 2, True, "2 passed"),
        ([Outcome(0, PYTEST.splitlines()[0], 1), Outcome(1, PYTEST, 1)], False, "2 passed, 1 failed: test_b[x]"),
        (
            [Outcome(0, "", 1, FILES), Outcome(None, PYTEST.splitlines()[0], 1, FILES)],
            None,
            "1 passed; 1 of 2 processes stopped at their time limit; not reached: late.py",
        ),
        ([Outcome(None, "\n".join(PYTEST.splitlines()[:2]), 1)], False, "1 failed: test_b[x]; 1 of 1 processes stopped"),
        ([Outcome(0, PYTEST.splitlines()[0], 1), Outcome(5, "no tests ran", 1)], True, "1 passed"),
        ([Outcome(5, "no tests ran", 1)], None, "0 passed"),
        ([Outcome(4, "ERROR: file not found", 1)], False, "exit code 4: ERROR: file not found"),
    ],
)
def test_all_shares_of_the_tests_are_judged_together(outcomes, passed, note):
    named = {f"trees {i + 1} of {len(outcomes)}": outcome for i, outcome in enumerate(outcomes)}
    found = judges.verdicts(named | {"check": Outcome(None, "", 1)})
    assert list(found) == ["trees", "check"] and found["trees"][0] is passed and note in found["trees"][1]
    assert list(judges.verdicts({"1 of 1": outcomes[0]})) == [""]


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
