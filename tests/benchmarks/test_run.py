"""The entry: every candidate has a complete row, pages and plots are written, and nothing is by a narrowed run."""

import json

import pytest
import torch

import report
import run

TINY = ["--device", "cpu", "--ceiling-size", "64"]
COLUMNS = ("seconds", "times_ours", "flops_rate", "of_floor", "floor", "peak_bytes")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The results folder of a smoke run of all ops, without FlexAttention, which takes its time to compile."""
    import bench_thought_attention
    import bench_thought_decode

    folder = tmp_path_factory.mktemp("results")
    modules = (bench_thought_attention, bench_thought_decode)
    originals = [module.candidates for module in modules]
    for module, candidates in zip(modules, originals, strict=True):
        module.candidates = lambda case, f=candidates: [peer for peer in f(case) if peer.name != "FlexAttention, compiled"]
    try:
        run.main(["--smoke", *TINY, "--results", str(folder), "--json", str(folder / "rows")])
    finally:
        for module, candidates in zip(modules, originals, strict=True):
            module.candidates = candidates
    return folder


@pytest.fixture
def results(smoke):
    (path,) = report.all_results(smoke)
    return report.load(path)


def test_every_candidate_of_every_op_has_a_complete_row(results):
    rows = results["rows"]
    assert {row["op"] for row in rows} == set(run.MODULES)
    for row in rows:
        if row["op"] == "host":  # it has neither sizes nor work
            assert row["candidate"] and row["seconds"] is not None
            continue
        assert row["version"] and row["sizes"] and row["dtype"] and row["candidate"]
        if row["seconds"] is None:
            assert row["note"] and not row["is_ours"], row
            assert not row["note"].startswith(("failed", "refused")), row
        else:
            assert all(row[column] is not None for column in COLUMNS), row
            assert row["rounds"] >= 1
    ours = [row for row in rows if row["is_ours"]]
    assert len(ours) == sum(len(module.smoke(torch.device("cpu"))) for module in run.MODULES.values())


def test_the_machine_is_described(results):
    machine = results["machine"]
    assert set(machine["served_by"].values()) == {"cpu"}
    assert machine["device"].endswith("threads") and machine["packages"]["torch"] and machine["date"]
    assert results["ceilings"]["copy"] > 0 and results["ceilings"]["float32"] > 0


def test_page_plots_and_index_are_written(smoke, results):
    (path,) = (path for path in smoke.glob("*.md") if path.stem != "README")
    text = path.read_text()
    for row in results["rows"]:
        assert f"| {row['candidate']} |" in text
        assert report.case_of(row) in text
    assert "nan" not in text.lower().split() and "None" not in text
    assert (smoke / "README.md").read_text() == report.index(smoke)
    assert f"]({path.name})" in report.index(smoke) and "Not measured. Measure one with `make gpu`" in report.index(smoke)
    plots = list(smoke.glob("*.png"))
    assert {plot.stem.rpartition("-")[2] for plot in plots} == {"floor"}  # one length and one T make no curve
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert all(f"]({plot.name})" in text for plot in plots)


def test_json_is_what_the_page_was_made_of(smoke, results):
    assert json.loads((smoke / "rows").read_text()) == results


def test_a_narrowed_run_writes_only_its_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "never")
    file = tmp_path / "rows.json"
    argv = ["--op", "sample_token", "--grid", "headline", "--smoke", *TINY]
    run.main([*argv, "--json", str(file)])
    assert not (tmp_path / "never").exists()
    assert {row["op"] for row in report.load(file)["rows"]} == {"sample_token"}
    assert "sample_token, headline: forward, R 256 D 32 V 300, float32" in capsys.readouterr().out


def test_out_of_time_is_said(tmp_path):
    file = tmp_path / "rows.json"
    run.main(["--op", "naive", "--smoke", *TINY, "--minutes", "0", "--json", str(file)])
    (row,) = report.load(file)["rows"]
    assert row["note"] == "not run: out of time" and row["seconds"] is None


def test_a_wrong_result_of_ours_fails_the_run(monkeypatch, tmp_path):
    import bench_sample_token

    wrong = run.MODULES["sample_token"].OURS
    monkeypatch.setattr(
        bench_sample_token, "OURS", type(wrong)(wrong.name, lambda case: lambda hidden, weight: hidden @ weight.T * 2)
    )
    with pytest.raises(SystemExit, match="sample_token: refused, a wrong result: logits differs"):
        run.main(["--op", "sample_token", "--smoke", *TINY])


def test_list_says_which_peers_cannot_run(capsys):
    run.main(["--list", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "this kernel is for GPUs" in said and "headline: thought_attention forward, B 1 L 256" in said


def test_help_names_the_ops_and_an_unknown_grid_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    said = capsys.readouterr().out
    assert all(op in said for op in run.MODULES) and "--full" in said and "ceiling" not in said.partition("options")[2]
    with pytest.raises(SystemExit, match="no nonsense here; there are .*headline"):
        run.main(["--grid", "nonsense", "--device", "cpu"])


def test_the_least_important_cases_come_last():
    found = run.select(run.parse(["--device", "cpu"]))
    assert [case.op for _, case in found[: len(run.MODULES)]] == list(run.MODULES)
    assert all(case.grid == "headline" for _, case in found[: len(run.MODULES)])


def test_ours_comes_first_and_stays_where_it_fails_beside_its_peers(tmp_path, monkeypatch):
    """A peer may take the device down with it: what this run has measured before stays, and the run fails."""
    import bench_sample_token

    seen = []

    def broken(case, ours, peers, rates, effort):
        seen.append(len(peers))
        if peers:
            raise RuntimeError("the device is gone")
        return run.compare(case, ours, peers, rates, effort)

    monkeypatch.setattr(bench_sample_token, "compare", broken, raising=False)
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match="the device is gone"):
        run.main(["--op", "sample_token", "--smoke", *TINY, "--ours-first", "--json", str(file)])
    (row,) = report.load(file)["rows"]
    assert seen == [0, 3] and row["seconds"] and row["note"] == ""


def test_runs_into_one_file_add_up(tmp_path):
    file = tmp_path / "rows.json"
    for op in ("sample_token", "naive"):
        run.main(["--op", op, "--smoke", *TINY, "--json", str(file)])
    assert list(dict.fromkeys(row["op"] for row in report.load(file)["rows"])) == ["sample_token", "naive"]
