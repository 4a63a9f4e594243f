"""Run the benchmarks: every op against what people use without it, checked for equal results, then timed in turn.

    make bench                                               all ops, a default grid, under five minutes
    python benchmarks/run.py --full                          the whole grid, up to where dense masks die
    python benchmarks/run.py --op thought_attention          one op
    python benchmarks/run.py --grid headline text            the headline cases and those that vary the text's length
    python benchmarks/run.py --list                          cases, peers, and why a peer can't run here
    python benchmarks/run.py --op sample_token --json a.json the rows into a file, beside those of other cases there

It measures the machine's ceilings first, a copy and a matmul, so that every row can say how far from the floor it is. A run of
all ops and grids writes benchmarks/results/<device>.md, .json and, with matplotlib, .png; a narrower one what --json names.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "python")]  # where nothing is installed

import torch  # noqa: E402

import bench_host  # noqa: E402
import bench_linear_logprob  # noqa: E402
import bench_memory  # noqa: E402
import bench_naive  # noqa: E402
import bench_sample_token  # noqa: E402
import bench_step  # noqa: E402
import bench_thought_attention  # noqa: E402
import bench_thought_decode  # noqa: E402
import report  # noqa: E402
import results_file  # noqa: E402
from case import Case  # noqa: E402
from compare import FULL, QUICK, SMOKE, Effort, Row, blank, compare, said  # noqa: E402
from machine import ceilings, describe, device_name  # noqa: E402

MODULES: dict[str, ModuleType] = {
    "thought_attention": bench_thought_attention,
    "thought_decode": bench_thought_decode,
    "sample_token": bench_sample_token,
    "linear_logprob": bench_linear_logprob,
    "step": bench_step,
    "naive": bench_naive,
    "memory": bench_memory,
    "host": bench_host,
}
AND = "` and `"  # between the commands of a file that several filled; a page has them as code
MINUTES = 4.5  # of the default grid


def main(argv: Sequence[str] | None = None, op: str | None = None) -> None:
    """Args: op: the only one, where a bench_<op>.py runs as a script."""
    args = parse(argv, op)
    if args.device.type == "cpu":
        torch.set_num_threads(args.threads)
    found = select(args)
    if args.list:
        return show(found)
    began = time.monotonic()
    print(f"{device_name(args.device)}: {len(found)} cases", flush=True)
    results = begin(args, found, " ".join(["python benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]))
    print(report.device_lines(results)[2], flush=True)
    measured, failed = set(), {}

    def write(some: Sequence[Row]) -> None:
        """What this run has measured stays where the same fails later: a peer may have taken the device down with it."""
        new = [row.as_dict() for row in some if row.seconds is not None or row.key not in measured]
        measured.update(row.key for row in some if row.seconds is not None)
        results["rows"] = results_file.merged(results["rows"], new, list(MODULES))
        if args.json:
            results_file.save(results, args.json)

    write([blank(case, module.OURS, results_file.NOT_REACHED) for module, case in found])
    effort = SMOKE if args.smoke else FULL if args.full else QUICK
    for alone in (True, False) if args.ours_first else (False,):
        for of_case in run(found, results["ceilings"], effort, began + 60 * args.minutes, write, alone):
            write(of_case)
            report.print_case([row.as_dict() for row in of_case])
            failed |= {row.key: row for row in of_case if row.is_ours and row.seconds is None}
    report.print_goals(args.device.type, results["rows"])
    if args.results or not (args.op or args.grid or args.smoke):
        print(f"\nWritten: {report.write(results, args.results or report.RESULTS)}")
    print(f"{len(found)} cases in {(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        sys.exit("\n".join(f"{report.case_of(row.as_dict())}: {row.candidate}: {row.note}" for row in failed.values()))


def begin(args: argparse.Namespace, found: Sequence[tuple[ModuleType, Case]], command: str) -> dict[str, Any]:
    """Results without new rows: what --json holds already of this device, and its fastest ceilings."""
    dtypes = list(dict.fromkeys(case.dtype for _, case in found))
    machine, rates = describe(args.device), ceilings(args.device, dtypes, args.ceiling_size)
    results: dict[str, Any] = {"machine": machine, "ceilings": rates, "command": command, "rows": []}
    if args.json and args.json.exists():
        before = results_file.load(args.json)
        if before["machine"]["device"] == machine["device"]:
            fastest = {name: max(rate, rates.get(name, 0.0)) for name, rate in before["ceilings"].items()}
            commands = dict.fromkeys([*before["command"].split(AND), command])
            results = before | results | {"ceilings": rates | fastest, "rows": before["rows"], "command": AND.join(commands)}
    return results


def parse(argv: Sequence[str] | None, op: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    if op is None:
        parser.add_argument(
            "--op", nargs="+", choices=MODULES, default=[], metavar="OP", help=f"one or more of {', '.join(MODULES)}"
        )
    else:
        parser.set_defaults(op=[op])
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="GRID", help="headline, text, thoughts, rows, ...; --list shows each op's"
    )
    parser.add_argument("--full", action="store_true", help="the whole grid, more rounds, no time limit")
    parser.add_argument("--smoke", action="store_true", help="the smallest cases: does everything run? times mean nothing")
    parser.add_argument("--list", action="store_true", help="what would run, and which peers can't")
    parser.add_argument("--ours-first", action="store_true", help="all cases without peers first, then again with them")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each case; others stay in it")
    parser.add_argument("--minutes", type=float, help=f"start no case after these; default {MINUTES}, with --full no limit")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if gpu else "cpu"), help="cuda or cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads PyTorch may use on a CPU, default 2")
    parser.add_argument("--results", type=Path, help="folder for the pages, default benchmarks/results")
    parser.add_argument("--ceiling-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.minutes is None:
        args.minutes = float("inf") if args.full else MINUTES
    if args.device.type == "cuda" and not gpu:
        parser.error("--device cuda: PyTorch finds no GPU here")
    return args


def select(args: argparse.Namespace) -> list[tuple[ModuleType, Case]]:
    """The cases to run: the first of every op, the second, and so on, so that a time limit cuts the least important."""
    modules = [MODULES[op] for op in args.op or MODULES]
    make = (lambda m: m.smoke(args.device)) if args.smoke else (lambda m: m.cases(args.device, args.full))
    every = [[(module, case) for case in make(module)] for module in modules]
    known = {case.grid for cases in every for _, case in cases}
    if unknown := set(args.grid) - known:
        sys.exit(f"--grid: no {', '.join(sorted(unknown))} here; there are {', '.join(sorted(known))}")
    mixed = (pair for row in itertools.zip_longest(*every) for pair in row if pair is not None)
    return [(module, case) for module, case in mixed if not args.grid or case.grid in args.grid]


def run(
    found: Sequence[tuple[ModuleType, Case]],
    rates: dict[str, float],
    effort: Effort,
    deadline: float,
    write: Callable[[list[Row]], None] = lambda rows: None,
    alone: bool = False,
) -> Iterator[list[Row]]:
    """The rows of each case; a case that fails as a whole, or comes after the deadline, has one row that says so.

    Args:
        write: takes the rows of a case so far.
        alone: without the peers.
    """
    for module, case in found:
        if time.monotonic() >= deadline:
            yield [blank(case, module.OURS, results_file.OUT_OF_TIME)]
            continue
        peers = [] if alone else module.candidates(case)
        try:
            if hasattr(module, "compare"):
                yield module.compare(case, module.OURS, peers, rates, effort)
            else:
                yield compare(case, module.OURS, peers, rates, effort, write)
        except Exception as error:
            row = blank(case, module.OURS, said(error))
            row.is_ours = True
            yield [row]


def show(found: Sequence[tuple[ModuleType, Case]]) -> None:
    for module, case in found:
        print(f"\n{case.grid}: {case}")
        for peer in (module.OURS, *module.candidates(case)):
            print(f"  {peer.name:<40} {peer.why_not(case) or peer.version}")


if __name__ == "__main__":
    main()
