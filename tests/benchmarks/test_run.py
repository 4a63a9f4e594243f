"""``benchmarks.run``: every candidate has a complete row, and pages and plots are written except by a narrower run."""

import pytest
import torch

from benchmarks import bench_sample_token, bench_thought_attention, bench_thought_decode, run
from benchmarks.baselines.head import SAMPLERS
from benchmarks.harness import machine
from benchmarks.harness.candidate import Candidate
from benchmarks.harness.clock import Timing
from benchmarks.harness.compare import compare
from benchmarks.harness.machine import ceilings, describe
from benchmarks.report import pages, results_file, tables
from benchmarks.run import BENCHMARKS, main
from quietstar_kernels.cpu import _library

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--ceiling-size", "64"]
COLUMNS = ("seconds", "times_ours", "flops_rate", "of_roofline", "roofline", "peak_bytes")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The results folder of a smoke run of all ops, without FlexAttention, which takes long to compile."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bench_thought_attention, bench_thought_decode):
            baselines = module.BENCHMARK.candidates
            patch.setattr(
                module.BENCHMARK,
                "candidates",
                lambda case, baselines=baselines: [
                    baseline for baseline in baselines(case) if baseline.name != "FlexAttention, compiled"
                ],
            )
        main(["--smoke", *TINY, "--results", str(folder), "--json", str(folder / "rows")])
    return folder


@pytest.fixture
def results(smoke):
    (path,) = pages.all_results(smoke)
    return results_file.load(path)


def test_every_candidate_of_every_op_has_a_complete_row(results):
    rows = results["rows"]
    assert {row["op"] for row in rows} == set(BENCHMARKS) and list(BENCHMARKS) == list(tables.TITLES)
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
    rows = results_file.load(file)["rows"]
    assert [row["candidate"] for row in rows] == ["batched", "naive", "careful naive"]
    assert all(row["note"] == "not run: out of time" and row["seconds"] is None for row in rows)


def test_a_wrong_result_of_ours_fails_the_run(monkeypatch, tmp_path):
    wrong = Candidate("sample_token", lambda case: lambda hidden, weight: hidden @ weight.T * 2)
    monkeypatch.setattr(bench_sample_token.BENCHMARK, "ours", wrong)
    with pytest.raises(SystemExit, match="sample_token: refused, a wrong result: logits differs"):
        main(["--op", "sample_token", "--smoke", *TINY])


def test_ours_stays_where_a_baseline_takes_the_device_down(tmp_path, monkeypatch):
    """What this run has measured before is kept, and the run fails."""

    def broken(case, ours, baselines, conditions):
        conditions.write(compare(case, ours, [], conditions))
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(run, "compare", broken)
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match="the device is gone"):
        main(["--op", "sample_token", "--smoke", *TINY, "--json", str(file)])
    row, *others = results_file.load(file)["rows"]
    assert row["seconds"] and row["note"] == ""
    assert len(others) == len(SAMPLERS) and all(other["note"] == results_file.NOT_REACHED for other in others)


def test_a_page_and_plots_are_written_from_the_json(smoke, results):
    (path,) = smoke.glob("*.md")
    text = path.read_text()
    assert all(f"| {row['candidate']} |" in text and tables.case_of(row) in text for row in results["rows"])
    assert "nan" not in text.lower().split() and "None" not in text
    (plot,) = smoke.glob("*.png")  # one length and one T make no curve
    assert plot.stem.endswith("-roofline") and f"]({plot.name})" in text and plot.read_bytes().startswith(b"\x89PNG")
    assert results_file.load(smoke / "rows") == results
    assert set(results["machine"]["served_by"].values()) == {"cpu"}
    assert results["machine"]["instructions"] == _library.instruction_set()


WAYS = ["memory copy", "memory copy in a graph", "kernel", "kernel in a graph"]


@pytest.mark.parametrize("fastest", range(4))
def test_the_copy_of_a_gpu_is_the_fastest_of_four_ways(monkeypatch, fastest):
    """By a memory copy and by a kernel, each in a CUDA graph and outside of one; all of them copy, and all are reported."""
    rand, seen, numbers = torch.randn, [], 64 * 16384
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **more: rand(*shape, **more))
    targets = []
    monkeypatch.setattr(torch, "empty_like", lambda x: targets.append((x, x.new_zeros(x.shape))) or targets[-1][1])

    def measure(candidates, device, graph=None):
        (run,) = candidates["run"]
        run()
        if device.type == "cuda" and graph is not None:
            source, target = targets[0]
            assert torch.equal(source, target), "it doesn't copy"
            target.zero_()
            seen.append(graph)
        return {"run": Timing([1e-3 if len(seen) - 1 == fastest else 2e-3])}

    monkeypatch.setattr(machine, "measure", measure)
    rates = ceilings(torch.device("cuda"), [torch.bfloat16], 64)
    assert seen == [False, True, False, True]
    assert rates["copy"] == pytest.approx(2 * 4 * numbers / 1e-3)
    assert {name: rate == rates["copy"] for name, rate in rates.items() if name.startswith("copy, ")} == {
        f"copy, {way}": i == fastest for i, way in enumerate(WAYS)
    }
    assert rates.keys() == {"copy", "bfloat16", *(f"copy, {way}" for way in WAYS)}


def test_peak_rates_are_above_those_of_libraries(monkeypatch):
    rates = ceilings(CPU, [torch.bfloat16], 64)
    if not _library.missing():
        assert {"copy", "float32", "bfloat16", "PyTorch float32", "PyTorch bfloat16"} <= rates.keys()
        assert all(rates[x] >= rates[f"PyTorch {x}"] for x in ("float32", "bfloat16"))
    monkeypatch.setattr(_library, "missing", lambda: "there is no compiler")
    assert ceilings(CPU, [torch.bfloat16], 64).keys() == {"copy", "bfloat16"}
    assert describe(CPU)["instructions"] is None


def test_runs_of_other_instructions_do_not_add_up(tmp_path):
    """Processors of one name may have different ones. Files from before these were recorded are added to."""
    file = tmp_path / "rows.json"
    main(["--op", "sample_token", "--smoke", *TINY, "--json", str(file)])
    old = results_file.load(file)
    for other, kept in ((old["machine"] | {"instructions": "other"}, False), ({"device": old["machine"]["device"]}, True)):
        results_file.save(old | {"machine": other, "ceilings": {"copy": 1e15}}, file)
        main(["--op", "naive", "--smoke", *TINY, "--json", str(file)])
        new = results_file.load(file)
        assert ("sample_token" in {row["op"] for row in new["rows"]}) == (new["ceilings"]["copy"] == 1e15) == kept


def test_what_is_listed(capsys):
    main(["--list", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "this kernel is for GPUs" in printed and "headline: thought_attention forward, B 1 L 256" in printed
    with pytest.raises(SystemExit, match="no nonsense here; choose from .*headline"):
        main(["--grid", "nonsense", "--device", "cpu"])
