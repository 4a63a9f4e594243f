"""Compile what the benchmarks launch into the caches on disk, many cases at the same time in separate processes.

    python -m benchmarks.gpu.warm --rows "--op thought_attention --grid headline" --rows "--op trees --against FlexAttention"

Each process calls ours once, as the benchmark will, or a baseline that compiles (``Candidate.compiles``). The benchmark then
finds the kernels in Triton's or TorchInductor's cache, so that the few minutes on a GPU are spent on timing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are as many processes as cores

import torch  # noqa: E402

from benchmarks import run  # noqa: E402
from benchmarks.harness.benchmark import Benchmark  # noqa: E402
from benchmarks.harness.candidate import PACKAGE, Candidate  # noqa: E402
from benchmarks.harness.case import Case  # noqa: E402
from benchmarks.harness.compare import as_note  # noqa: E402

Task = tuple[str, int, str]  # options of ``benchmarks.run``, the place of a case among those they select, a candidate's name


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="append", required=True, metavar="OPTIONS", help="of benchmarks.run, what to compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="the smallest cases")
    args = parser.parse_args(argv)
    began, failed, done = time.monotonic(), 0, 0
    more = f" --device {args.device}{' --smoke' if args.smoke else ''}"
    tasks: dict[tuple[str, str], Task] = {}  # by what is called, which several options may select
    met: Counter[tuple[str, str, str]] = Counter()
    order: dict[Task, int] = {}  # a first case of every op and candidate, then a second, as most cases share their kernels
    for options in args.rows:
        for i, (benchmark, case) in enumerate(selected(options + more)):
            for candidate in compiling(options + more, benchmark, case):
                task = tasks.setdefault((f"{case.grid} {case}", candidate.name), (options + more, i, candidate.name))
                if task not in order:
                    order[task] = met[case.op, case.what, candidate.name]
                    met[case.op, case.what, candidate.name] += 1
    pool = ProcessPoolExecutor(max(1, min(len(tasks), os.cpu_count() or 1)), get_context("spawn"))
    for finished in as_completed([pool.submit(call, *task) for task in sorted(order, key=order.__getitem__)]):
        what, error, seconds = finished.result()
        done, failed = done + 1, failed + bool(error)
        print(f"{what}: {error or 'called'}, {seconds:.1f} s", flush=True)
    print(f"{done} candidates called, {failed} failed, in {time.monotonic() - began:.0f} s", flush=True)
    for process in active_children():
        process.kill()  # after compiling, a process may wait at exit for its compiler processes


def parsed(options: str) -> argparse.Namespace:
    return run.make_parser().parse_args(shlex.split(options))


def selected(options: str) -> list[tuple[Benchmark, Case]]:
    return run.select(parsed(options))


def compiling(options: str, benchmark: Benchmark, case: Case) -> list[Candidate]:
    others = run.baselines(parsed(options), benchmark, case)
    some = [candidate for candidate in others if candidate.package == PACKAGE or candidate.compiles]
    mine = [] if benchmark.op == "host" else [benchmark.ours]  # whose kernels are tiny, or empty
    return [candidate for candidate in (*mine, *some) if candidate.why_not(case) is None]


def call(options: str, place: int, name: str) -> tuple[str, str | None, float]:
    """Call one candidate of one case once. Returns what it was, what it raised, and the seconds it took."""
    began = time.monotonic()
    benchmark, case = selected(options)[place]
    candidate = next(candidate for candidate in compiling(options, benchmark, case) if candidate.name == name)
    error = None
    try:
        some = case if candidate.compiles else case.to_compile()
        with candidate.switch():
            some.call(candidate.prepare(some), some.inputs(seed=0))
        if case.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the processes share the device
    except Exception as raised:
        error = as_note(raised)
    return f"{case}: {name}", error, time.monotonic() - began


if __name__ == "__main__":
    main()
