"""``make gpu`` with only what docs/building.md asks for installed: every stage, though its times mean nothing."""

import subprocess

import pytest

from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.stages import STAGES
from benchmarks.report import pages, results_file, tables
from benchmarks.report.missing import missing


@pytest.mark.long
def test_every_stage_runs_with_nothing_else_installed(tmp_path):
    command = ["make", "gpu-rehearsal", f"RESULTS={tmp_path}", "MINUTES=15"]  # four are enough on an idle machine
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (path,) = pages.all_results(tmp_path)
    results = results_file.load(path)
    assert list(dict.fromkeys(line["stage"].partition(",")[0] for line in results["stages"])) == [*STAGES]
    assert results["machine"]["packages"]["triton"] == "3.6.0" and results["machine"]["packages"]["transformers"] == "5.17.0"
    assert set(results["machine"]["served_by"].values()) == {"triton"}
    ours = [row for row in results["rows"] if row["is_ours"]]
    assert {row["op"] for row in ours} == set(tables.TITLES) - {"memory"}
    assert {row["op"] for row in ours if not row["seconds"]} == {"group_rl", "hybrid"}
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
    summary = done.stdout[done.stdout.index("\n## ") :]
    assert "| naive, thoughts, L 8" in summary and all(line in summary for line in found)
