"""The benchmark of the host's time, and what empty kernels show about launches."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench_host as bench

pytestmark = pytest.mark.long  # each runs Triton in a process of its own
KERNELS = [
    "attention_backward_keys",
    "attention_backward_keys",
    "attention_backward_queries",
    "attention_backward_sum",
    "attention_forward",
    "attention_ranges",
    "attention_rows",
]


@pytest.mark.parametrize("what", ["attention forward+backward", "sample_token"])
def test_a_row_for_the_call(device, conditions, what):
    (case,) = bench.smoke(device)
    (row,) = bench.compare(replace(case, what=what), bench.OURS, [], conditions)
    assert row.is_ours and row.seconds > 0


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such device|nowhere"):
        bench.measured(bench.HostCase(what="decode", device="nowhere"))()


@pytest.fixture(scope="module")
def launches():
    path = os.pathsep.join(filter(None, [str(bench.ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(Path(__file__).parent / "launches.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_known_launches_compile_and_bind_nothing_again(launches):
    """A forward followed by a backward compiles all kernels; slices of a layout are launches of the same plans."""
    kernels = len(KERNELS)
    assert launches["names"] == KERNELS
    assert launches["forward"][0] == kernels and launches["forward"][2] == 1
    assert launches["backward"] == [0, kernels - 1, kernels]
    assert len(set(launches["unaligned"])) > 1 and {compiled for compiled, _, _ in launches["chunks"]} == {0}
    assert launches["again"] == [[0, 0, kernels]] * len(launches["again"])
    assert launches["another dtype"][0] == kernels
