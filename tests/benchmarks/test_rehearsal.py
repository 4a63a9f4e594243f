"""``make gpu`` with only what docs/building.md asks for installed: every stage, though its times mean nothing."""

import subprocess
import time

import pytest

from benchmarks.gpu.processes import ROOT, STOPPED
from benchmarks.gpu.stages import STAGES
from benchmarks.report import pages, results_file, tables
from benchmarks.report.missing import NO_TIME, missing


def rehearse(folder, minutes):
    command = ["make", "gpu-rehearsal", f"RESULTS={folder}", f"MINUTES={minutes}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (path,) = pages.all_results(folder)
    return path, results_file.load(path), done.stdout


@pytest.mark.long
def test_every_stage_runs_with_nothing_else_installed(tmp_path):
    path, results, printed = rehearse(tmp_path, 15)  # four are enough on an idle machine
    assert list(dict.fromkeys(line["stage"].partition(",")[0] for line in results["stages"])) == [*STAGES]
    assert results["machine"]["packages"]["triton"] == "3.6.0" and results["machine"]["packages"]["transformers"] == "5.17.0"
    assert set(results["machine"]["served_by"].values()) == {"triton"}
    ours = [row for row in results["rows"] if row["is_ours"]]
    assert {row["op"] for row in ours} == set(tables.TITLES) - {"memory"}
    assert {row["op"] for row in ours if not row["seconds"]} == {"group_rl"}
    found = missing(results)
    assert not any(line.startswith(("Not run", "Stopped", "Cases not reached")) for line in found), found
    assert not any("failed" in line or "refused" in line for line in found), found
    assert any("group_rl, SharedPrompts" in line and "trl is not installed here" in line for line in found)
    notes = {line["stage"]: line["note"] for line in results["stages"]}
    assert int(notes["tests"].split()[0]) > 20 and notes["check, trees"] == "2 passed"
    assert "copy " in notes["check, device"] and "ncu is not on PATH" in notes["profile, counters"]
    kernels = path.with_name(f"{path.stem}-kernels.txt").read_text().splitlines()
    assert len(kernels) == 22 and kernels[1].split() == ["ms", "share", "calls", "operator"]
    assert path.with_suffix(".log").stat().st_size > 10_000
    assert "## Missing" in path.with_suffix(".md").read_text()
    summary = printed[printed.index("\n## ") :]
    assert "\nGoals: " in summary and "| naive, thoughts, L 8" in summary


@pytest.mark.long
def test_what_did_not_run_in_time_is_named(tmp_path):
    began = time.monotonic()
    _, results, printed = rehearse(tmp_path, 0.6)
    assert time.monotonic() - began < 70
    named = [line for line in missing(results) if line.startswith(("Not run: ", "Stopped: ", "Cases not reached: "))]
    assert named and all(line in printed for line in named)
    late = {line["stage"] for line in results["stages"] if line["note"] in (NO_TIME, STOPPED)}
    done = {line["stage"].partition(",")[0] for line in results["stages"]}
    assert late and all(name in " ".join(named[:2]) for name in late | (set(STAGES) - done))
