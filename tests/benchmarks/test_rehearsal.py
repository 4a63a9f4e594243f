"""``make gpu`` with only what docs/building.md asks for installed: every stage, though its times mean nothing."""

import subprocess

import pytest

from benchmarks.gpu.processes import ROOT
from benchmarks.report import pages, results_file, tables
from benchmarks.report.missing import STAGES, missing


@pytest.mark.long
def test_every_stage_runs_with_nothing_else_installed(tmp_path):
    command = ["make", "gpu-rehearsal", f"RESULTS={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (path,) = pages.all_results(tmp_path)
    results = results_file.load(path)
    assert {line["stage"].partition(",")[0] for line in results["stages"]} == set(STAGES)
    assert results["machine"]["packages"]["triton"] == "3.6.0" and results["machine"]["packages"]["transformers"] == "5.17.0"
    assert set(results["machine"]["served_by"].values()) == {"triton"}
    ours = [row for row in results["rows"] if row["is_ours"]]  # group_rl has no cases without TRL
    assert {row["op"] for row in ours} == set(tables.TITLES) - {"group_rl"} and all(row["seconds"] for row in ours)
    found = missing(results)
    assert not any(line.startswith(("Stages not run", "Stopped", "Cases not reached")) for line in found), found
    assert not any("failed" in line or "refused" in line for line in found), found
    tests = next(line for line in results["stages"] if line["stage"] == "tests")
    assert tests["passed"] and int(tests["note"].split()[0]) > 20
    assert path.with_suffix(".log").stat().st_size > 10_000
    assert "## Missing" in path.with_suffix(".md").read_text()
    summary = done.stdout[done.stdout.index("\n## ") :]
    assert "\nGoals: " in summary and "| naive, thoughts, L 8" in summary
