"""Compile what the benchmarks launch, all cases at once in processes of their own, into the caches on disk.

    python benchmarks/warm.py --op thought_attention

Each process calls ours and what else compiles (``Peer.compiles``) once, as the benchmark will. A kernel compiled here is read
from Triton's or TorchInductor's cache there, so that a few minutes on a GPU go into timing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "python")]  # where nothing is installed

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are as many as the cores

import torch  # noqa: E402

import run  # noqa: E402
from compare import said  # noqa: E402
from peers import PACKAGE, Peer  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=run.MODULES, required=True, metavar="OP")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="the smallest cases")
    args = parser.parse_args(argv)
    began, failed, done = time.monotonic(), 0, 0
    tasks = [(op, i, peer.name) for op in args.op for i, case in enumerate(cases(op, args)) for peer in compiling(op, case)]
    pool = ProcessPoolExecutor(max(1, min(len(tasks), os.cpu_count() or 1)), get_context("spawn"))
    for finished in as_completed([pool.submit(call, *task, args) for task in tasks]):
        what, error, seconds = finished.result()
        done, failed = done + 1, failed + bool(error)
        print(f"{what}: {error or 'called'}, {seconds:.1f} s", flush=True)
    print(f"{done} called once, {failed} of them failed, in {time.monotonic() - began:.0f} s", flush=True)
    for process in active_children():
        process.kill()  # one that has compiled may wait at its end for compilers it keeps


def cases(op: str, args: argparse.Namespace) -> list:
    module, device = run.MODULES[op], torch.device(args.device)
    return list(module.smoke(device) if args.smoke else module.cases(device, False))


def compiling(op: str, case: run.Case) -> list[Peer]:
    module = run.MODULES[op]
    some = [peer for peer in module.candidates(case) if peer.package == PACKAGE or peer.compiles]
    return [module.OURS, *(peer for peer in some if peer.why_not(case) is None)]


def call(op: str, index: int, name: str, args: argparse.Namespace) -> tuple[str, str | None, float]:
    """Call one candidate of one case, once; what it was, what it raised, seconds."""
    began = time.monotonic()
    case = cases(op, args)[index].to_compile()
    peer = next(peer for peer in compiling(op, case) if peer.name == name)
    error = None
    try:
        case.call(peer.prepare(case), case.inputs(seed=0))
        if case.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the device is everybody's
    except Exception as raised:
        error = said(raised)
    return f"{case}: {name}", error, time.monotonic() - began


if __name__ == "__main__":
    main()
