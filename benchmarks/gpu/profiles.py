"""Profiles as text: hardware counters of the attention kernels, and the kernels of a training step that take most of its time.

    python -m benchmarks.gpu.profiles counters --out counters.txt    by Nsight Compute's ncu, of one forward and backward
    python -m benchmarks.gpu.profiles kernels --out kernels.txt      by PyTorch's profiler, of a step of the 0.6B shape

Counters need ncu on PATH and the right to read them; clocks stay as they are. Units are ncu's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_step, bench_thought_attention
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.case import Case
from benchmarks.report import results_file

LARGEST = 20  # kernels of a step
KERNELS = "regex:^(gluon_attention_(forward|text_keys)|attention_(forward|backward_(queries|keys)))$"
# Shares of a GPU's peak: products, exponentials, instructions. Bytes from L2 and from memory. And what warps wait for, in warps
# per issued instruction; gmma is the product of a warp group.
STALLS = ("long_scoreboard", "short_scoreboard", "wait", "barrier", "gmma")
STALLS += ("math_pipe_throttle", "mio_throttle", "not_selected")
METRICS = [
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum",
    "lts__t_bytes.sum.per_second",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes.sum",
    "dram__bytes.sum.per_second",
    *(f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in STALLS),
]
SURE = [x for x in METRICS if x.startswith(("gpu__time", "smsp__i", "sm__inst", "lts__t_bytes", "dram__bytes"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, help="write the text to this file, too")
    args = parser.parse_args()
    text, last = WAYS[args.what](args.device)
    print(text)
    if args.out and text:
        results_file.write(text, args.out)
        last += f", in {args.out.name}"
    print(last)


def case_of(benchmark: Benchmark, device: torch.device, grid: str, what: str) -> Case:
    """On a CPU the smallest one."""
    cases = benchmark.cases(device, False) if device.type == "cuda" else benchmark.smoke(device)
    return next(case for case in cases if case.grid == grid and case.what == what)


def counters(device: torch.device) -> tuple[str, str]:
    """A table of the metrics for each kernel, of a forward and backward at L 2048, by Triton and by Gluon."""
    if not (ncu := shutil.which("ncu")):
        return "", "ncu is not on PATH"
    watched = [ncu, "--clock-control", "none", "--target-processes", "all", "--kernel-name-base", "function"]
    watched += ["--kernel-name", KERNELS]
    called = [sys.executable, "-m", "benchmarks.gpu.profiles", "call", "--device", str(device)]
    for metrics in (METRICS, SURE):  # an older ncu may refuse all for one name that it doesn't know
        done = subprocess.run([*watched, "--metrics", ",".join(metrics), *called], capture_output=True, text=True)
        if done.returncode == 0 and METRICS[0] in done.stdout:
            return done.stdout, f"{sum(name in done.stdout for name in METRICS)} of {len(METRICS)} metrics"
    return sys.exit("\n".join([*done.stdout.splitlines(), *done.stderr.splitlines()][-20:]))


def call(device: torch.device) -> tuple[str, str]:
    """What ncu watches."""
    case = case_of(bench_thought_attention.BENCHMARK, device, "text", "forward+backward")
    for candidate in (bench_thought_attention.OURS, bench_thought_attention.IN_GLUON):
        if candidate.why_not(case) is None:
            with candidate.switch():
                case.call(candidate.prepare(case), case.inputs(seed=1))
    return "", "called"


def kernels(device: torch.device) -> tuple[str, str]:
    """The largest kernels of a training step, after two others; on a CPU its operators."""
    case = case_of(bench_step.BENCHMARK, device, "0.6B", "training step")
    step, inputs = bench_step.OURS.prepare(case), case.inputs(seed=1)
    for _ in range(2):
        case.call(step, inputs)
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
        case.call(step, inputs)
        if gpu:
            torch.cuda.synchronize()
    averages = [x for x in profiled.key_averages() if not x.is_user_annotation]  # which hold kernels
    found = [(x.self_device_time_total if gpu else x.self_cpu_time_total, x.count, x.key) for x in averages]
    total, largest = sum(time for time, *_ in found), sorted(found, reverse=True)[:LARGEST]
    lines = [f"{case}", f"{'ms':>9} {'share':>6} {'calls':>6}  {'kernel' if gpu else 'operator'}"]
    lines += [f"{time / 1e3:9.2f} {time / total:6.1%} {count:6}  {name[:100]}" for time, count, name in largest]
    return "\n".join(
        lines
    ), f"{LARGEST} of {len(found)} kernels, {sum(x for x, *_ in largest) / total:.0%} of {total / 1e3:.0f} ms"


WAYS: dict[str, Callable[[torch.device], tuple[str, str]]] = {"counters": counters, "kernels": kernels, "call": call}

if __name__ == "__main__":
    main()
