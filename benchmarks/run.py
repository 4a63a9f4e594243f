"""Run the benchmarks: every op against what people use without it, checked for equal results and then timed in turn.

    make bench                                                    all ops, the default grid, in under five minutes
    python -m benchmarks.run --full                               the whole grid, up to the sizes where dense masks fail
    python -m benchmarks.run --op thought_attention               one op
    python -m benchmarks.run --grid headline text                 the headline cases and those that vary the text's length
    python -m benchmarks.run --list                               cases, baselines, and why a baseline can't run here
    python -m benchmarks.run --op sample_token --json rows.json   add the rows to a file, which may have others

It first measures the machine's peak rates, so that every row can say how far it is from its roofline: on a CPU with a copy and
with multiply-adds in registers, beside the matmuls of PyTorch and oneDNN; on a GPU with a copy and a matmul.
A run of all ops and grids writes benchmarks/results/<device>.md, .json and, with matplotlib, .png. A narrower run writes only
the file that --json names. Run it in the repository's root; where quietstar isn't installed, set PYTHONPATH=python.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import (
    bench_branches,
    bench_group_rl,
    bench_host,
    bench_hybrid,
    bench_linear_logprob,
    bench_memory,
    bench_naive,
    bench_online,
    bench_sample_token,
    bench_step,
    bench_thought_attention,
    bench_thought_decode,
    bench_trees,
)
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import Candidate
from benchmarks.harness.case import Case
from benchmarks.harness.compare import FAILED, FULL, QUICK, SMOKE, Conditions, Row, as_note, blank, check_device, compare
from benchmarks.harness.machine import device_name
from benchmarks.report import pages, results_file, tables, units
from benchmarks.report.results_file import NOT_REACHED, OUT_OF_TIME

MODULES = (
    bench_thought_attention,
    bench_thought_decode,
    bench_sample_token,
    bench_linear_logprob,
    bench_branches,
    bench_trees,
    bench_step,
    bench_naive,
    bench_group_rl,
    bench_hybrid,
    bench_online,
    bench_memory,
    bench_host,
)
BENCHMARKS = {module.BENCHMARK.op: module.BENCHMARK for module in MODULES}  # in the order of the results pages
OWN = "own sizes"  # the grid of --sizes
MINUTES = 4.5  # for the default grid

Found = Sequence[tuple[Benchmark, Case]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the arguments say, by default those of the process."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if args.device.type == "cpu":
        torch.set_num_threads(args.threads)
    found = select(args)
    if args.list:
        return show(args, found)
    began = time.monotonic()
    print(f"{device_name(args.device)}: {units.count(len(found), 'case')}", flush=True)
    command = " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    results = results_file.begin(args.json, args.device, [case.dtype for _, case in found], command, args.ceiling_size)
    print(tables.device_lines(results)[2], flush=True)
    measured, failed = set(), {}

    def write(some: Sequence[Row]) -> None:
        """A failure doesn't replace what this run has measured, since a baseline may have taken the device down."""
        new = [row.as_dict() for row in some if row.seconds is not None or row.key not in measured]
        measured.update(row.key for row in some if row.seconds is not None)
        results["rows"] = results_file.merged(results["rows"], new, list(tables.TITLES))
        if args.json:
            results_file.save(results, args.json)

    write([waiting for benchmark, case in found for waiting in not_reached(args, benchmark, case)])
    effort = SMOKE if args.smoke else FULL if args.full else QUICK
    minutes = args.minutes if args.minutes is not None else float("inf") if args.full else MINUTES
    for of_case in run(args, found, Conditions(results["ceilings"], effort, write), began + 60 * minutes):
        write(of_case)
        tables.print_case([row.as_dict() for row in of_case])
        failed |= {row.key: row for row in of_case if row.is_ours and row.note.startswith(FAILED)}
    if args.results or not (args.op or args.grid or args.sizes or args.smoke or args.against is not None):
        print(f"\nWritten: {pages.write(results, args.results or pages.RESULTS)}")
    print(f"{units.count(len(found), 'case')} in {(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        sys.exit("\n".join(f"{tables.case_of(row.as_dict())}: {row.candidate}: {row.note}" for row in failed.values()))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = f"one or more of {', '.join(BENCHMARKS)}"
    parser.add_argument("--op", nargs="+", choices=BENCHMARKS, default=[], metavar="OP", help=ops)
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="GRID", help="headline, text, thoughts, rows, ...; see --list for each op's"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=sizes, default=[], metavar="B=4,L=512", help="the headline cases with these sizes, no others"
    )
    parser.add_argument(
        "--against", nargs="*", metavar="NAME", help="only baselines whose names begin like this; without a name, none"
    )
    parser.add_argument("--full", action="store_true", help="the whole grid and more rounds, without a time limit")
    parser.add_argument("--smoke", action="store_true", help="the smallest cases, to see whether all runs; ignore the times")
    parser.add_argument("--list", action="store_true", help="show what would run, and which baselines can't")
    parser.add_argument("--json", type=Path, help="write the rows to this file after each case; it keeps those of other cases")
    parser.add_argument("--minutes", type=float, help=f"start no case after this time; default {MINUTES}, no limit with --full")
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=default, help="cuda or cpu")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads on a CPU, default 2")
    parser.add_argument("--results", type=Path, help="folder for the pages, default benchmarks/results")
    parser.add_argument("--ceiling-size", type=int, help=argparse.SUPPRESS)
    return parser


def sizes(text: str) -> dict[str, int]:
    """Of "B=4,L=512"."""
    try:
        found = {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}
    except ValueError:
        found = {}
    if not found or min(found.values()) < 1:
        raise argparse.ArgumentTypeError(f"must be letters and positive integers such as B=4,L=512, got {text}")
    return found


def select(args: argparse.Namespace) -> list[tuple[Benchmark, Case]]:
    """The cases to run: the first of every op in the order of ``--op``, then the second, and so on, so that a time limit drops
    the least important."""
    chosen = [BENCHMARKS[op] for op in args.op or BENCHMARKS]
    every = [[(b, case) for case in (b.smoke(args.device) if args.smoke else b.cases(args.device, args.full))] for b in chosen]
    if args.sizes:
        every = [
            [(b, case) for size in args.sizes for case in resized(b, [case for _, case in cases], size)]
            for b, cases in zip(chosen, every, strict=True)
        ]
    known = {case.grid for cases in every for _, case in cases}
    if (unknown := set(args.grid) - known) and not args.smoke:  # which has fewer, and on a CPU fewer baselines
        sys.exit(f"--grid: no {', '.join(sorted(unknown))} here; choose from {', '.join(sorted(known))}")
    mixed = [pair for row in itertools.zip_longest(*every) for pair in row if pair is not None]
    found = [(benchmark, case) for benchmark, case in mixed if not args.grid or case.grid in args.grid]
    names = dict.fromkeys(candidate.name for benchmark, case in found for candidate in benchmark.candidates(case))
    if (strange := [name for name in args.against or () if not any(x.startswith(name) for x in names)]) and not args.smoke:
        sys.exit(f"--against: no {', '.join(strange)} here; choose from {', '.join(names)}")
    return found


def resized(benchmark: Benchmark, cases: Sequence[Case], sizes: dict[str, int]) -> list[Case]:
    """The headline cases with other sizes, as a grid of their own."""
    heads = [case for case in cases if case.grid == "headline"]
    if not heads:
        sys.exit(f"--sizes: {benchmark.op} has no headline case here")
    if unknown := [name for name in sizes if name not in heads[0].size_names]:
        sys.exit(f"--sizes: {benchmark.op} has no {', '.join(unknown)}; it has {', '.join(heads[0].size_names)}")
    return [replace(case, grid=OWN, **sizes) for case in heads]


def baselines(args: argparse.Namespace, benchmark: Benchmark, case: Case) -> list[Candidate]:
    """Those of a case that ``--against`` leaves."""
    found = benchmark.candidates(case)
    return found if args.against is None else [x for x in found if x.name.startswith(tuple(args.against))]


def not_reached(args: argparse.Namespace, benchmark: Benchmark, case: Case, note: str = NOT_REACHED) -> list[Row]:
    """Rows of a case that has not begun."""
    others = [blank(case, candidate, note) for candidate in baselines(args, benchmark, case)]
    return [blank(case, benchmark.ours, note, is_ours=True), *others]


def run(args: argparse.Namespace, found: Found, conditions: Conditions, deadline: float) -> Iterator[list[Row]]:
    """The rows of each case. A case that fails as a whole, or would start after the deadline, has one row with the reason."""
    for benchmark, case in found:
        if time.monotonic() >= deadline:
            yield not_reached(args, benchmark, case, OUT_OF_TIME)
            continue
        against = baselines(args, benchmark, case)
        try:
            yield (benchmark.compare or compare)(case, benchmark.ours, against, conditions)
        except Exception as error:
            check_device(case.device, error)
            yield [blank(case, benchmark.ours, as_note(error), is_ours=True)]


def show(args: argparse.Namespace, found: Found) -> None:
    for benchmark, case in found:
        print(f"\n{case.grid}: {case}")
        for candidate in (benchmark.ours, *baselines(args, benchmark, case)):
            print(f"  {candidate.name:<48} {candidate.why_not(case) or candidate.version}")


if __name__ == "__main__":
    main()
