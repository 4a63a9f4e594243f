"""README and result pages say what the results files say."""

import json
import re

import pytest

from benchmarks import bench_step, readme
from benchmarks.report import goals, pages, ratios, results_file, units
from benchmarks.report.committed import with_block


def row(op="thought_attention", candidate="thought_attention", what="forward", seconds=0.05, grid="headline", **more):
    base = {
        "op": op, "grid": grid, "what": what, "dtype": "float32", "sizes": {"B": 1, "L": 256}, "candidate": candidate,
        "version": "x 1", "is_ours": candidate == op, "is_partial": False, "seconds": seconds, "low": seconds, "high": seconds,
        "rounds": 7, "times_ours": 1.0, "flops_rate": 7e10, "bytes_rate": 1e9, "roofline": 0.02, "of_roofline": 0.4,
        "bound_by": "matmul", "peak_bytes": 41943040, "note": "",
    }  # fmt: skip
    return base | more


@pytest.fixture
def results():
    baselines = [
        row(candidate="SDPA, dense mask", seconds=1.25, times_ours=25.0),
        row(candidate="FlexAttention, compiled", seconds=0.14, times_ours=2.8),
        row(candidate="FlexAttention, FLASH", seconds=None, times_ours=None, note="this kernel is for GPUs"),
    ]
    packages = {"torch": "2.13.0", "triton": None, "transformers": "5.23.0"}
    machine = {"device": "Test CPU, 2 threads", "kind": "cpu", "date": "2026-11-20", "python": "3.11.7"}
    machine |= {"packages": packages, "served_by": {"thought_attention": "cpu"}, "load": 0.1}
    return {
        "machine": machine,
        "ceilings": {"copy": 2e10, "float32": 1.5e11},
        "command": "make bench",
        "rows": [row(), *baselines],
    }


def test_page_has_every_row_and_its_reason(results):
    page = pages.page(results)
    assert "| SDPA, dense mask | 1.25 s | 1.25 s to 1.25 s | 25.0x | 70.0 GFLOP/s | 40 % | 40.0 MiB |" in page
    assert "| FlexAttention, FLASH |" in page and "this kernel is for GPUs" in page
    assert "copy 20.0 GB/s, matmul float32 150 GFLOP/s" in page and "Not installed here: triton" in page


def test_page_says_what_the_peak_is_and_what_matmuls_reach(results):
    results["machine"]["instructions"] = "avx512"
    matmuls = {"PyTorch float32": 1.98e11, "PyTorch bfloat16": 4.1e11, "oneDNN float32": 4.41e11}
    results["ceilings"] = {"copy": 3.07e10, "float32": 4.9e11, "bfloat16": 4.9e11, **matmuls}
    assert (
        "The CPU library runs its code for avx512. Peak: 490 GFLOP/s of multiply-adds in float32, 490 GFLOP/s in bfloat16, "
        "copy 30.7 GB/s. Matmuls reach 198 GFLOP/s with PyTorch in float32 (40 %), 410 GFLOP/s with PyTorch in bfloat16 "
        "(84 %), 441 GFLOP/s with oneDNN in float32 (90 %).\n"
    ) in pages.page(results)


@pytest.mark.long
def test_written_files_and_curves(results, tmp_path):
    for L, seconds in ((64, 0.01), (512, 0.2)):
        results["rows"] += [row(grid="text", sizes={"B": 1, "L": L}, seconds=seconds)]
        results["rows"] += [row(grid="text", sizes={"B": 1, "L": L}, candidate="SDPA, dense mask", seconds=20 * seconds)]
    for T in (1, 4):
        step = {"op": "step", "what": "training step", "grid": "passes", "sizes": {"T": T}}
        results["rows"] += [row(candidate="QuietStar", **step) | {"is_ours": True}, row(candidate="published schedule", **step)]
    page = pages.write(results, tmp_path)
    assert page.name == "test-cpu-2-threads.md"
    drawn = {path.stem.removeprefix("test-cpu-2-threads-") for path in tmp_path.glob("*.png")}
    assert drawn == {"time", "memory", "passes", "roofline"}
    assert json.loads((tmp_path / "test-cpu-2-threads.json").read_text()) == results


def test_goals(results):
    by_name = {goal.what: goal for goal in goals.CPU}
    rows = results["rows"]
    flex, dense = (
        by_name[f"attention forward, {x}"] for x in ("speedup over compiled FlexAttention", "L >= 256, speedup over dense SDPA")
    )
    assert flex.verdict(rows) == (">= 2.50x", "2.80x", "pass")
    assert dense.verdict(rows) == (">= 15.0x", "25.0x", "pass")
    worse = [*rows, row(candidate="FlexAttention, compiled", grid="text", times_ours=1.1)]
    assert flex.verdict(worse)[1:] == ("1.10x", "miss")  # the worst case counts
    assert flex.verdict([row()]) == (">= 2.50x", "", "not measured")


def test_goals_of_a_gpu():
    by_name = {goal.what: goal for goal in goals.GPU}
    rows = [row(seconds=0.1, flops_rate=700e12, sizes={"L": 2048}, grid="text")]
    assert by_name["attention forward, L 2048, useful FLOP/s"].verdict(rows) == (">= 500 TFLOP/s", "700 TFLOP/s", "pass")
    longer = [x | {"sizes": {"L": 4096}, "flops_rate": 1e12} for x in rows]
    assert by_name["attention forward, L 2048, useful FLOP/s"].verdict(rows + longer)[1:] == ("700 TFLOP/s", "pass")
    decode = {"op": "thought_decode"}
    rows = [
        row(**decode, candidate="thought_decode", of_roofline=0.72),
        row(**decode, times_ours=3.0, candidate="SDPA, dense mask"),
    ]
    rows += [row(**decode, times_ours=1.9, candidate="flash prefix + own block (PyTorch)")]
    rows += [row(**decode, times_ours=1.1, candidate="thought_decode, triton", version="quietstar-kernels 0.1.0")]  # no rival
    assert by_name["decode step, speedup over the fastest baseline"].verdict(rows)[1:] == ("1.90x", "miss")
    assert by_name["decode step, share of the roofline"].verdict(rows)[1:] == ("72 %", "pass")
    seconds, memory = (by_name[f"linear_logprob, 8192 x 4096 x 152k, {what}"] for what in ("time", "memory"))
    loss = row(op="linear_logprob", candidate="linear_logprob", what="forward+backward", seconds=0.045, peak_bytes=7 * 2**30)
    again = loss | {"candidate": "linear_logprob, no logits kept", "is_ours": False, "seconds": 0.06, "peak_bytes": 2**40}
    assert seconds.verdict([loss, again]) == ("<= 50.0 ms", "45.0 ms", "pass")
    assert memory.verdict([loss, again]) == ("<= 6.00 GiB", "7.00 GiB", "miss")
    step = row(op="step", candidate="QuietStar", what="training step", grid="Llama 8B, LoRA", of_roofline=0.55) | {
        "is_ours": True
    }
    assert by_name["training step, Llama 8B class, share of the roofline"].verdict([step]) == (">= 60 %", "55 %", "miss")


@pytest.mark.parametrize("page, name", readme.blocks(), ids=lambda x: getattr(x, "stem", x))
def test_pages_say_what_the_committed_results_say(page, name):
    """If this fails, run ``python -m benchmarks.readme``."""
    text = page.read_text()
    assert with_block(text, name, readme.blocks()[page, name]) == text


def test_the_chart_shows_the_fastest_rival_and_is_that_of_the_committed_results(results, tmp_path):
    """If the last line fails, run ``python -m benchmarks.readme``."""
    results_file.save(results, tmp_path / "test.json")
    drawn = readme.chart(tmp_path)
    assert ">2.80</tspan>" in drawn and "FlexAttention, compiled" in drawn
    assert "dense mask" not in drawn and "this kernel is for GPUs" not in drawn
    assert readme.CHART.read_text() == readme.chart()


def test_a_share_names_the_copy_that_it_is_of(results, tmp_path):
    """In the page and in the README; where a GPU's copy was timed in one way alone, with a doubt, else with each way's rate."""
    results["machine"]["kind"] = "cuda"
    results["rows"] = [row(bound_by="copy", bytes_rate=1.35e12, of_roofline=0.5), row(what="forward+backward", of_roofline=0.4)]
    results["ceilings"] = {"copy": 2.7e12, "float32": 1.5e11}

    def written():
        results_file.save(results, tmp_path / "test.json")
        return pages.page(results), readme.section(tmp_path)

    share, doubt = "50 % of a copy at 2.70 TB/s |", "is in doubt"
    assert all(share in text and "| 40 % |" in text and doubt in text for text in written())
    results["ceilings"] |= {"copy, memory copy in a graph": 2.7e12, "copy, kernel": 2.1e12}
    page, section = written()
    assert share in page and share in section and doubt not in page + section
    assert "The copy by memory copy in a graph 2.70 TB/s, kernel 2.10 TB/s." in page


def test_the_section_has_the_real_model_of_a_gpu_and_not_the_toy(results, tmp_path):
    step = {"op": "step", "candidate": "QuietStar", "what": "training step"}
    results["rows"] = [row(**step, grid=grid) | {"is_ours": True} for grid in (bench_step.LARGEST, "small", "0.6B")]
    results_file.save(results, tmp_path / "test.json")
    assert [line.split("`")[2][:30] for line in readme.section(tmp_path).splitlines() if "`step`" in line] == [
        " Llama 8B, LoRA: training step"
    ]


def test_ratios_of_branches_and_trees():
    rows = [
        row(
            "branches",
            sizes={"L": 2048, "C": 8, "S": 256, "H": 4, "G": 2, "K": 64},
            candidate="copies",
            what=what,
            times_ours=x,
        )
        for what, x in (("forward", 2.5), ("forward+backward", 3.0))
    ]
    rows += [rows[0] | {"candidate": "slow", "times_ours": 9.0, "note": "4.10 times the pairs"}]
    rows += [rows[0] | {"grid": "drafter", "candidate": "copies", "times_ours": None}]
    found = ratios.table({"machine": {"device": "GPU"}, "rows": rows}, "branches", ratios.of_branches)
    assert found[0] == "GPU, 4 query heads and 2 key heads of width 64, float32:"
    assert found[2:5] == [
        "|  | copies | slow |",
        "| --- | --- | --- |",
        "| prompt of 2,048, 8 branches of 256 | 2.50, 3.00 | 9.00, - (4.10) |",
    ]
    assert len(found) == 6 and ratios.table({"rows": rows}, "trees", ratios.of_trees) == []


def test_the_section_of_the_readme_has_the_headline_cases_and_what_is_not_measured(results, tmp_path):
    assert re.search(r"\d", readme.section(tmp_path)) is None and "CPUs: not measured" in readme.section(tmp_path)
    results_file.save(results, tmp_path / "test-cpu-2-threads.json")
    section = readme.section(tmp_path)
    assert "**Test CPU, 2 threads**, 2026-11-20, torch 2.13.0" in section and "GPUs: not measured. `make gpu`" in section
    assert "| 50.0 ms | 40 % | SDPA, dense mask 25.0; FlexAttention, compiled 2.80 |" in section


def test_units():
    assert [units.seconds(x) for x in (1.234, 0.0123, 4.56e-6)] == ["1.23 s", "12.3 ms", "4.56 µs"]
    assert [units.flops(x) for x in (6.2e14, 5e8)] == ["620 TFLOP/s", "500 MFLOP/s"]
    assert (units.bandwidth(4.3e12), units.memory(3 * 2**30)) == ("4.30 TB/s", "3.00 GiB")
    assert (units.times(1234.5), units.percent(0.834), units.percent(0.0123)) == ("1,234x", "83 %", "1.2 %")
