"""README and result pages say what the results files say."""

import copy
import json
import re

import pytest

from benchmarks import readme
from benchmarks.report import goals, pages, results_file, units


def row(op="thought_attention", candidate="thought_attention", what="forward", seconds=0.05, grid="headline", **more):
    base = {
        "op": op, "grid": grid, "what": what, "dtype": "float32", "sizes": {"B": 1, "L": 256}, "candidate": candidate,
        "version": "x 1", "is_ours": candidate == op, "is_floor": False, "seconds": seconds, "low": seconds, "high": seconds,
        "rounds": 7, "times_ours": 1.0, "flops_rate": 7e10, "bytes_rate": 1e9, "floor": 0.02, "of_floor": 0.4,
        "bound_by": "matmul", "peak_bytes": 41943040, "note": "",
    }  # fmt: skip
    return base | more


@pytest.fixture
def results():
    peers = [
        row(candidate="SDPA, dense mask", seconds=1.25, times_ours=25.0),
        row(candidate="FlexAttention, compiled", seconds=0.14, times_ours=2.8),
        row(candidate="FlexAttention, FLASH", seconds=None, times_ours=None, note="this kernel is for GPUs"),
    ]
    packages = {"torch": "2.13.0", "triton": None, "transformers": "5.23.0"}
    machine = {"device": "Test CPU, 2 threads", "kind": "cpu", "date": "2026-11-20", "python": "3.11.7"}
    machine |= {"packages": packages, "served_by": {"thought_attention": "cpu"}, "load": 0.1}
    return {"machine": machine, "ceilings": {"copy": 2e10, "float32": 1.5e11}, "command": "make bench", "rows": [row(), *peers]}


@pytest.fixture
def folder(results, tmp_path):
    (tmp_path / "test-cpu-2-threads.json").write_text(json.dumps(results))
    return tmp_path


def test_readme_says_what_the_committed_results_say():
    """If this fails, run ``python -m benchmarks.readme``."""
    text = readme.README.read_text()
    assert readme.updated(text) == text


def test_committed_pages_are_those_of_their_results():
    assert (pages.RESULTS / "README.md").read_text() == pages.index()
    for path in pages.all_results():
        plots = [path.with_name(f"{path.stem}-{kind}.png") for kind in ("time", "memory", "passes", "chunks", "floor")]
        plots = [plot for plot in plots if plot.exists()]
        assert path.with_suffix(".md").read_text() == pages.page(results_file.load(path), plots), path


def test_a_readme_number_that_differs_from_the_results_is_noticed(results, folder):
    text = f"# x\n{readme.BEGIN}{readme.END}rest\n"
    fresh = readme.updated(text, folder)
    assert fresh.startswith("# x\n") and fresh.endswith("rest\n") and readme.updated(fresh, folder) == fresh
    assert "Test CPU, 2 threads" in fresh and "2026-11-20" in fresh and "torch 2.13.0" in fresh
    assert "| 50.0 ms | 40 % | SDPA, dense mask 25.0; FlexAttention, compiled 2.80 |" in fresh
    for number in ("50.0", "40 %", "25.0", "2.80"):
        assert readme.updated(fresh.replace(number, "99", 1), folder) == fresh != fresh.replace(number, "99", 1)
    slower = copy.deepcopy(results)
    slower["rows"][0]["seconds"] = 0.07
    (folder / "test-cpu-2-threads.json").write_text(json.dumps(slower))
    assert readme.updated(fresh, folder) != fresh


def test_what_is_not_measured_is_reported(folder, tmp_path_factory):
    assert "GPUs: not measured. `make gpu`" in readme.section(folder) and "CPUs" not in readme.section(folder)
    empty = tmp_path_factory.mktemp("empty")
    assert "CPUs: not measured" in readme.section(empty) and "GPUs: not measured" in readme.section(empty)
    assert re.search(r"\d", readme.section(empty)) is None


def test_a_readme_without_marks_is_refused(folder):
    with pytest.raises(ValueError, match="performance: begin"):
        readme.updated("# x\n", folder)


def test_page_has_every_row_and_its_reason(results):
    page = pages.page(results)
    assert "| SDPA, dense mask | 1.25 s | 1.25 s to 1.25 s | 25.0x | 70.0 GFLOP/s | 40 % | 40.0 MiB |" in page
    assert "| FlexAttention, FLASH |" in page and "this kernel is for GPUs" in page
    assert "copy 20.0 GB/s, matmul float32 150 GFLOP/s" in page and "Not installed here: triton" in page


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
    assert drawn == {"time", "memory", "passes", "floor"}
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
    sample = {"op": "sample_token", "sizes": {"R": 256}}
    rows = [row(**sample, candidate="sample_token"), row(**sample, candidate="the matmul alone", is_floor=True, times_ours=0.9)]
    assert by_name["sample_token, R >= 256, time over the matmul's"].verdict(rows) == ("<= 1.12x", "1.11x", "pass")
    rows[1]["times_ours"] = 0.8
    assert by_name["sample_token, R >= 256, time over the matmul's"].verdict(rows)[1:] == ("1.25x", "miss")
    both = "forward+backward"
    flex = {"candidate": "FlexAttention, compiled"}
    rows = [row(seconds=0.01), row(what=both, seconds=0.03), row(**flex, seconds=0.02), row(**flex, what=both, seconds=0.08)]
    assert by_name["attention backward, speedup over FlexAttention"].verdict(rows) == (">= 1.50x", "3.00x", "pass")
    long = {"sizes": {"L": 2048}, "grid": "text"}
    rows = [row(seconds=0.1, flops_rate=700e12, **long), row(what=both, seconds=0.4, flops_rate=612.5e12, **long)]
    assert by_name["attention forward, L >= 2048, useful FLOP/s"].verdict(rows)[1:] == ("700 TFLOP/s", "pass")
    assert by_name["attention backward, L >= 2048, useful FLOP/s"].verdict(rows)[1:] == ("583 TFLOP/s", "pass")
    decode = {"op": "thought_decode"}
    rows = [
        row(**decode, candidate="thought_decode", of_floor=0.72),
        row(**decode, times_ours=3.0, candidate="SDPA, dense mask"),
    ]
    rows += [row(**decode, times_ours=1.9, candidate="flash prefix + own block (PyTorch)")]
    assert by_name["decode step, speedup over the fastest peer"].verdict(rows)[1:] == ("1.90x", "miss")
    assert by_name["decode step, share of floor"].verdict(rows)[1:] == ("72 %", "pass")
    seconds, memory = (by_name[f"linear_logprob, 8192 x 4096 x 152k, {what}"] for what in ("time", "memory"))
    loss = row(op="linear_logprob", candidate="linear_logprob", what=both, seconds=0.06)
    assert seconds.verdict([loss]) == ("<= 50.0 ms", "", "not measured")  # the default recomputes the logits
    kept = loss | {"candidate": "linear_logprob, logits kept", "seconds": 0.045, "peak_bytes": 7 * 2**30}
    assert seconds.verdict([loss, kept])[1:] == ("45.0 ms", "pass")
    assert memory.verdict([loss, kept]) == ("<= 6.00 GiB", "7.00 GiB", "miss")
    step = row(op="step", candidate="QuietStar", what="training step", grid="Llama 8B, LoRA", of_floor=0.55) | {"is_ours": True}
    assert by_name["training step, Llama 8B class, share of floor"].verdict([step]) == (">= 60 %", "55 %", "miss")


@pytest.mark.parametrize(
    "show, value, text",
    [
        (units.seconds, 1.234, "1.23 s"),
        (units.seconds, 0.0123, "12.3 ms"),
        (units.seconds, 4.56e-6, "4.56 µs"),
        (units.flops, 6.2e14, "620 TFLOP/s"),
        (units.flops, 5e8, "500 MFLOP/s"),
        (units.bandwidth, 4.3e12, "4.30 TB/s"),
        (units.memory, 3 * 2**30, "3.00 GiB"),
        (units.times, 1234.5, "1,234x"),
        (units.percent, 0.834, "83 %"),
        (units.percent, 0.0123, "1.2 %"),
    ],
)
def test_units(show, value, text):
    assert show(value) == text


def test_ours_by_another_back_end_is_no_rival():
    goal = next(goal for goal in goals.GPU if goal.what.startswith("decode step, speedup over"))
    decode = {"op": "thought_decode", "times_ours": 2.5}
    rows = [row(**decode, candidate="thought_decode"), row(**decode, candidate="flash prefix + own block (PyTorch)")]
    other = row(**decode | {"times_ours": 1.1}, candidate="thought_decode, triton", version="quietstar-kernels 0.1.0")
    assert goal.verdict([*rows, other])[1:] == ("2.50x", "pass")
    assert goal.verdict([*rows, other | {"version": "x 1"}])[1:] == ("1.10x", "miss")
