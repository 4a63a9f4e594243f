"""Compile what the benchmarks launch into the caches on disk, many cases at the same time in separate processes.

    python -m benchmarks.gpu.warm --op thought_attention

Each process calls ours once, as the benchmark will, or a baseline that compiles (``Candidate.compiles``). The benchmark then
finds the kernels in Triton's or TorchInductor's cache, so that the few minutes on a GPU are spent on timing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are as many processes as cores

import torch  # noqa: E402

from benchmarks.harness.candidate import PACKAGE, Candidate  # noqa: E402
from benchmarks.harness.case import Case  # noqa: E402
from benchmarks.harness.compare import as_note  # noqa: E402
from benchmarks.run import BENCHMARKS  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=BENCHMARKS, required=True, metavar="OP")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="the smallest cases")
    args = parser.parse_args(argv)
    began, failed, done = time.monotonic(), 0, 0
    tasks = [
        (op, i, candidate.name) for op in args.op for i, case in enumerate(cases(op, args)) for candidate in compiling(op, case)
    ]
    pool = ProcessPoolExecutor(max(1, min(len(tasks), os.cpu_count() or 1)), get_context("spawn"))
    for finished in as_completed([pool.submit(call, *task, args) for task in tasks]):
        what, error, seconds = finished.result()
        done, failed = done + 1, failed + bool(error)
        print(f"{what}: {error or 'called'}, {seconds:.1f} s", flush=True)
    print(f"{done} candidates called, {failed} failed, in {time.monotonic() - began:.0f} s", flush=True)
    for process in active_children():
        process.kill()  # after compiling, a process may wait at exit for its compiler processes


def cases(op: str, args: argparse.Namespace) -> list[Case]:
    benchmark, device = BENCHMARKS[op], torch.device(args.device)
    return list(benchmark.smoke(device) if args.smoke else benchmark.cases(device, False))


def compiling(op: str, case: Case) -> list[Candidate]:
    benchmark = BENCHMARKS[op]
    some = [candidate for candidate in benchmark.candidates(case) if candidate.package == PACKAGE or candidate.compiles]
    return [benchmark.ours, *(candidate for candidate in some if candidate.why_not(case) is None)]


def call(op: str, index: int, name: str, args: argparse.Namespace) -> tuple[str, str | None, float]:
    """Call one candidate of one case once. Returns what it was, what it raised, and the seconds it took."""
    began = time.monotonic()
    case = cases(op, args)[index].to_compile()
    candidate = next(candidate for candidate in compiling(op, case) if candidate.name == name)
    error = None
    try:
        case.call(candidate.prepare(case), case.inputs(seed=0))
        if case.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the processes share the device
    except Exception as raised:
        error = as_note(raised)
    return f"{case}: {name}", error, time.monotonic() - began


if __name__ == "__main__":
    main()
