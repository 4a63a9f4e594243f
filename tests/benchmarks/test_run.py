"""``benchmarks.run``: every candidate has a complete row, and pages and plots are written except by a narrower run."""

import json

import pytest
import torch

from benchmarks import bench_sample_token, bench_thought_attention, bench_thought_decode, command
from benchmarks.harness.compare import compare
from benchmarks.harness.peer import Peer
from benchmarks.report import pages, results_file, tables
from benchmarks.run import BENCHMARKS

TINY = ["--device", "cpu", "--ceiling-size", "64"]
COLUMNS = ("seconds", "times_ours", "flops_rate", "of_floor", "floor", "peak_bytes")


def main(argv):
    command.main([*BENCHMARKS.values()], "", argv)


def select(argv):
    benchmarks = [*BENCHMARKS.values()]
    return command.select(benchmarks, command.parse(command.make_parser(benchmarks, ""), argv))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The results folder of a smoke run of all ops, without FlexAttention, which takes long to compile."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bench_thought_attention, bench_thought_decode):
            peers = module.BENCHMARK.candidates
            patch.setattr(
                module.BENCHMARK,
                "candidates",
                lambda case, peers=peers: [peer for peer in peers(case) if peer.name != "FlexAttention, compiled"],
            )
        main(["--smoke", *TINY, "--results", str(folder), "--json", str(folder / "rows")])
    return folder


@pytest.fixture
def results(smoke):
    (path,) = pages.all_results(smoke)
    return results_file.load(path)


def test_every_candidate_of_every_op_has_a_complete_row(results):
    rows = results["rows"]
    assert {row["op"] for row in rows} == set(BENCHMARKS)
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
    assert len(ours) == sum(len(benchmark.smoke(torch.device("cpu"))) for benchmark in BENCHMARKS.values())


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
        assert tables.case_of(row) in text
    assert "nan" not in text.lower().split() and "None" not in text
    assert (smoke / "README.md").read_text() == pages.index(smoke)
    assert f"]({path.name})" in pages.index(smoke) and "None measured yet. Measure one with `make gpu`" in pages.index(smoke)
    plots = list(smoke.glob("*.png"))
    assert {plot.stem.rpartition("-")[2] for plot in plots} == {"floor"}  # one length and one T make no curve
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert all(f"]({plot.name})" in text for plot in plots)


def test_json_is_what_the_page_was_made_of(smoke, results):
    assert json.loads((smoke / "rows").read_text()) == results


def test_a_narrower_run_writes_only_its_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "never")
    file = tmp_path / "rows.json"
    argv = ["--op", "sample_token", "--grid", "headline", "--smoke", *TINY]
    main([*argv, "--json", str(file)])
    assert not (tmp_path / "never").exists()
    assert {row["op"] for row in results_file.load(file)["rows"]} == {"sample_token"}
    assert "sample_token, headline: forward, R 256 D 32 V 300, float32" in capsys.readouterr().out


def test_running_out_of_time_is_reported(tmp_path):
    file = tmp_path / "rows.json"
    main(["--op", "naive", "--smoke", *TINY, "--minutes", "0", "--json", str(file)])
    (row,) = results_file.load(file)["rows"]
    assert row["note"] == "not run: out of time" and row["seconds"] is None


def test_a_wrong_result_of_ours_fails_the_run(monkeypatch, tmp_path):
    wrong = Peer("sample_token", lambda case: lambda hidden, weight: hidden @ weight.T * 2)
    monkeypatch.setattr(bench_sample_token.BENCHMARK, "ours", wrong)
    with pytest.raises(SystemExit, match="sample_token: refused, a wrong result: logits differs"):
        main(["--op", "sample_token", "--smoke", *TINY])


def test_list_shows_which_peers_cannot_run(capsys):
    main(["--list", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "this kernel is for GPUs" in printed and "headline: thought_attention forward, B 1 L 256" in printed


def test_help_names_the_ops_and_an_unknown_grid_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(op in printed for op in BENCHMARKS) and "--full" in printed and "ceiling" not in printed.partition("options")[2]
    with pytest.raises(SystemExit, match="no nonsense here; choose from .*headline"):
        main(["--grid", "nonsense", "--device", "cpu"])


def test_the_least_important_cases_come_last():
    found = select(["--device", "cpu"])
    assert [case.op for _, case in found[: len(BENCHMARKS)]] == list(BENCHMARKS)
    assert all(case.grid == "headline" for _, case in found[: len(BENCHMARKS)])


def test_ours_comes_first_and_stays_where_it_fails_beside_its_peers(tmp_path, monkeypatch):
    """A peer may take the device down. What this run has measured before is kept, and the run fails."""
    seen = []

    def broken(case, ours, peers, rates, effort):
        seen.append(len(peers))
        if peers:
            raise RuntimeError("the device is gone")
        return compare(case, ours, peers, rates, effort)

    monkeypatch.setattr(bench_sample_token.BENCHMARK, "compare", broken)
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match="the device is gone"):
        main(["--op", "sample_token", "--smoke", *TINY, "--ours-first", "--json", str(file)])
    (row,) = results_file.load(file)["rows"]
    assert seen == [0, 3] and row["seconds"] and row["note"] == ""


def test_runs_into_one_file_add_up(tmp_path):
    file = tmp_path / "rows.json"
    for op in ("sample_token", "naive"):
        main(["--op", op, "--smoke", *TINY, "--json", str(file)])
    assert list(dict.fromkeys(row["op"] for row in results_file.load(file)["rows"])) == ["sample_token", "naive"]


def test_ops_are_in_the_order_of_the_pages():
    assert list(BENCHMARKS) == list(tables.TITLES)


def test_a_benchmark_alone_has_its_own_help_and_no_choice_of_ops(capsys):
    with pytest.raises(SystemExit):
        command.main([bench_sample_token.BENCHMARK], bench_sample_token.__doc__, ["--help"])
    printed = capsys.readouterr().out
    assert "python -m benchmarks.bench_sample_token" in printed and "lower bound" in printed and "--op " not in printed
