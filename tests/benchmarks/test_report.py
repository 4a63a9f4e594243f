"""README and result pages say what the results files say."""

import pytest

from benchmarks import readme
from benchmarks.report import pages, units
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


@pytest.mark.parametrize("page, name", readme.blocks(), ids=lambda x: getattr(x, "stem", x))
def test_pages_say_what_the_committed_results_say(page, name):
    """If this fails, run ``python -m benchmarks.readme``."""
    text = page.read_text()
    assert with_block(text, name, readme.blocks()[page, name]) == text


def test_the_chart_is_that_of_the_committed_results():
    """If this fails, run ``python -m benchmarks.readme``."""
    assert readme.CHART.read_text() == readme.chart()


def test_a_share_names_the_copy_that_it_is_of(results):
    """Where a GPU's copy was timed in one way alone, with a doubt, else with each way's rate."""
    results["machine"]["kind"] = "cuda"
    results["rows"] = [row(bound_by="copy", bytes_rate=1.35e12, of_roofline=0.5)]
    results["ceilings"] = {"copy": 2.7e12, "float32": 1.5e11}
    share, doubt = "50 % of a copy at 2.70 TB/s |", "is in doubt"
    assert share in (page := pages.page(results)) and doubt in page
    results["ceilings"] |= {"copy, memory copy in a graph": 2.7e12, "copy, kernel": 2.1e12}
    assert share in (page := pages.page(results)) and doubt not in page
    assert "The copy by memory copy in a graph 2.70 TB/s, kernel 2.10 TB/s." in page


def test_units():
    assert [units.seconds(x) for x in (1.234, 0.0123, 4.56e-6)] == ["1.23 s", "12.3 ms", "4.56 µs"]
    assert [units.flops(x) for x in (6.2e14, 5e8)] == ["620 TFLOP/s", "500 MFLOP/s"]
    assert (units.bandwidth(4.3e12), units.memory(3 * 2**30)) == ("4.30 TB/s", "3.00 GiB")
    assert (units.times(1234.5), units.percent(0.834), units.percent(0.0123)) == ("1,234x", "83 %", "1.2 %")
