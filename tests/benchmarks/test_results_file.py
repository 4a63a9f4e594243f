"""A results file is complete at any moment, and collects what several runs measure."""

import datetime

import pytest

from benchmarks.gpu.processes import STOPPED
from benchmarks.report import pages, results_file
from benchmarks.report.missing import NO_TIME, missing
from benchmarks.report.results_file import NOT_REACHED, OUT_OF_TIME, dated, merged, under

OPS = ["sample_token", "naive"]


def row(op="naive", candidate="batched", seconds=1.0, note="", L=8, **more):
    base = {"op": op, "grid": "headline", "what": "thoughts", "dtype": "float32", "sizes": {"L": L}, "candidate": candidate}
    return base | {"seconds": seconds, "note": note, "is_ours": candidate == "batched", "is_partial": False} | more


def test_new_rows_replace_those_of_their_case_and_candidate():
    old = [row("since renamed"), row(), row(candidate="naive"), row(L=9), row("sample_token")]
    new = [row(seconds=2.0), row(L=10)]
    now = [row("sample_token"), row(seconds=2.0), row(candidate="naive"), row(L=9), row(L=10), row("since renamed")]
    assert merged(old, new, OPS) == now


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
    lines = [{"stage": f"{name}, a", "passed": None, "note": ""} for name in ("check", "head")]
    lines += [{"stage": "peers, b", "passed": None, "note": NO_TIME}]
    lines[1]["note"] = STOPPED
    rows = [row(times_ours=1.0), row(L=9, seconds=None, note=NOT_REACHED), row(L=10, seconds=None, note=OUT_OF_TIME)]
    rows += [row(candidate="naive", seconds=None, times_ours=None, note="x is not installed here")]
    rows += [
        row(candidate="careful", seconds=None, note=NOT_REACHED),
        row(L=9, candidate="careful", seconds=None, note=NOT_REACHED),
    ]
    plan = ["check", "step", "peers", "head", "tests"]
    found = missing({"machine": {"kind": "cuda"}, "ceilings": {}, "plan": plan, "stages": lines, "rows": rows})
    assert found[:2] == ["Not run: step; tests; peers, b.", "Stopped: head, a."]
    case = "naive thoughts, L {}, float32"
    assert found[2] == f"Cases not reached: {case.format(9)}; {case.format(10)}; {case.format(8)}: careful."
    assert found[3] == "Without a time: naive, naive, 1 case: x is not installed here."


RATES = {"copy": 4e12, "copy, kernel": 4e12, "bfloat16": 8e14}


def test_rows_stand_under_the_highest_rates_of_their_file():
    """A later run may find a faster copy. Then the shares of earlier rows sink, and another rate may bind."""
    old = {"dtype": "bfloat16", "seconds": 1e-3, "flops_rate": 2e14, "bytes_rate": 1e12, "of_roofline": 0.5, "bound_by": "copy"}
    assert under(RATES, old) == old | {"roofline": 2.5e-4, "bound_by": "matmul", "of_roofline": 0.25}
    slow = RATES | {"copy": 2e12}
    assert under(slow, old) == old | {"roofline": 5e-4, "bound_by": "copy", "of_roofline": 0.5}
    untimed = old | {"seconds": None, "of_roofline": None}
    assert under(RATES, untimed) == untimed


def test_rows_of_an_earlier_run_keep_its_date():
    """The file has that of the last one."""
    old, untimed = row(note="x"), row(seconds=None, note=NOT_REACHED)
    assert dated(old, {"date": "2026-11-26"})["note"] == "x, measured on 2026-11-26"
    assert dated(dated(old, {"date": "2026-11-26"}), {"date": "2026-12-01"})["note"] == "x, measured on 2026-11-26"
    assert dated(untimed, {"date": "2026-11-26"}) == untimed
    assert dated(old, {"date": datetime.date.today().isoformat()}) == old == dated(old, {})


@pytest.mark.parametrize("path", pages.all_results(), ids=lambda path: path.stem)
def test_committed_rows_stand_under_the_rates_of_their_file(path):
    results = results_file.load(path)
    for row in results["rows"]:
        if row["of_roofline"] is not None:
            assert row["of_roofline"] == pytest.approx(under(results["ceilings"], row)["of_roofline"], rel=1e-6), row[
                "candidate"
            ]
