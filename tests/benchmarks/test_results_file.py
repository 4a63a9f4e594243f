"""A results file is complete at any moment, and collects what several runs measure."""

from benchmarks.report import results_file
from benchmarks.report.missing import STAGES, missing
from benchmarks.report.results_file import NOT_REACHED, OUT_OF_TIME, merged

OPS = ["sample_token", "naive"]


def row(op="naive", candidate="batched", seconds=1.0, note="", L=8, **more):
    base = {"op": op, "grid": "headline", "what": "thoughts", "dtype": "float32", "sizes": {"L": L}, "candidate": candidate}
    return base | {"seconds": seconds, "note": note, "is_ours": candidate == "batched", "is_partial": False} | more


def test_new_rows_replace_those_of_their_case_and_candidate():
    old = [row(), row(candidate="naive"), row(L=9), row("sample_token")]
    new = [row(seconds=2.0), row(L=10)]
    assert merged(old, new, OPS) == [row("sample_token"), row(seconds=2.0), row(candidate="naive"), row(L=9), row(L=10)]


def test_a_row_that_was_not_tried_replaces_nothing_and_a_failure_does():
    waiting, late, failed = (row(seconds=None, note=note) for note in (NOT_REACHED, OUT_OF_TIME, "failed: out of memory"))
    assert merged([row()], [waiting], OPS) == [row()] == merged([waiting], [row()], OPS)
    assert merged([waiting], [late], OPS) == [late]
    assert merged([row()], [failed], OPS) == [failed]


def test_the_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder/a.json"
    results_file.save({"rows": [1]}, path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        results_file.save({"rows": [2]}, path)
    except KeyboardInterrupt:
        assert results_file.load(path) == {"rows": [1]}
    else:
        raise AssertionError("it wrote in place")


def test_what_is_missing_is_reported():
    lines = [{"stage": f"{name}, a", "passed": None, "note": ""} for name in STAGES if name != "sanitize"]
    lines[3]["note"] = "stopped at its time limit"
    rows = [row(times_ours=1.0), row(L=9, seconds=None, note=NOT_REACHED), row(L=10, seconds=None, note=OUT_OF_TIME)]
    rows += [row(candidate="naive", seconds=None, times_ours=None, note="x is not installed here")]
    results = {"machine": {"kind": "cuda"}, "stages": lines, "rows": rows}
    found = missing(results)
    assert found[:2] == ["Stages not run: sanitize.", f"Stopped: {lines[3]['stage']}."]
    assert found[2].startswith("Goals not measured: decode step, speedup over") and found[3] == "Cases not reached: naive 2."
    assert found[4] == "Without a time: naive, naive, 1 case: x is not installed here."
