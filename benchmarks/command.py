"""The command line of ``python -m benchmarks.run`` and of each ``python -m benchmarks.bench_<op>``."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.case import Case
from benchmarks.harness.compare import FULL, QUICK, SMOKE, Effort, Row, as_note, blank, compare
from benchmarks.harness.machine import ceilings, describe, device_name
from benchmarks.report import pages, results_file, tables, units

AND = "` and `"  # between the commands of a results file that several runs have filled; a page shows them as code
MINUTES = 4.5  # for the default grid

Found = Sequence[tuple[Benchmark, Case]]


def main(benchmarks: Sequence[Benchmark], doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Run some benchmarks as the arguments say. With several, --op chooses among them.

    Args:
        doc: the help text.
        argv: by default those of the process.
    """
    parser = make_parser(benchmarks, doc)
    args = parse(parser, argv)
    if args.device.type == "cpu":
        torch.set_num_threads(args.threads)
    found = select(benchmarks, args)
    if args.list:
        return show(found)
    began = time.monotonic()
    print(f"{device_name(args.device)}: {units.count(len(found), 'case')}", flush=True)
    results = begin(args, found, " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]))
    print(tables.device_lines(results)[2], flush=True)
    measured, failed = set(), {}

    def write(some: Sequence[Row]) -> None:
        """A failure doesn't replace what this run has measured, since a baseline may have taken the device down."""
        new = [row.as_dict() for row in some if row.seconds is not None or row.key not in measured]
        measured.update(row.key for row in some if row.seconds is not None)
        results["rows"] = results_file.merged(results["rows"], new, list(tables.TITLES))
        if args.json:
            results_file.save(results, args.json)

    write([blank(case, benchmark.ours, results_file.NOT_REACHED) for benchmark, case in found])
    effort = SMOKE if args.smoke else FULL if args.full else QUICK
    deadline = began + 60 * args.minutes
    for alone in (True, False) if args.ours_first else (False,):
        for of_case in run(found, results["ceilings"], effort, deadline, write, alone):
            write(of_case)
            tables.print_case([row.as_dict() for row in of_case])
            failed |= {row.key: row for row in of_case if row.is_ours and row.seconds is None}
    tables.print_goals(args.device.type, results["rows"])
    if args.results or not (args.op or args.grid or args.smoke):
        print(f"\nWritten: {pages.write(results, args.results or pages.RESULTS)}")
    print(f"{units.count(len(found), 'case')} in {(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        sys.exit("\n".join(f"{tables.case_of(row.as_dict())}: {row.candidate}: {row.note}" for row in failed.values()))


def make_parser(benchmarks: Sequence[Benchmark], doc: str | None) -> argparse.ArgumentParser:
    ops = [benchmark.op for benchmark in benchmarks]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{'run' if len(ops) > 1 else f'bench_{ops[0]}'}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if len(ops) > 1:
        parser.add_argument("--op", nargs="+", choices=ops, default=[], metavar="OP", help=f"one or more of {', '.join(ops)}")
    else:
        parser.set_defaults(op=ops)
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="GRID", help="headline, text, thoughts, rows, ...; see --list for each op's"
    )
    parser.add_argument("--full", action="store_true", help="the whole grid and more rounds, without a time limit")
    parser.add_argument("--smoke", action="store_true", help="the smallest cases, to see whether all runs; ignore the times")
    parser.add_argument("--list", action="store_true", help="show what would run, and which baselines can't")
    parser.add_argument("--ours-first", action="store_true", help="run all cases without baselines first, then again with them")
    parser.add_argument("--json", type=Path, help="write the rows to this file after each case; it keeps those of other cases")
    parser.add_argument("--minutes", type=float, help=f"start no case after this time; default {MINUTES}, no limit with --full")
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=default, help="cuda or cpu")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads on a CPU, default 2")
    parser.add_argument("--results", type=Path, help="folder for the pages, default benchmarks/results")
    parser.add_argument("--ceiling-size", type=int, help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.minutes is None:
        args.minutes = float("inf") if args.full else MINUTES
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return args


def select(benchmarks: Sequence[Benchmark], args: argparse.Namespace) -> list[tuple[Benchmark, Case]]:
    """The cases to run: the first of every op, then the second, and so on, so that a time limit drops the least important."""
    chosen = [benchmark for benchmark in benchmarks if not args.op or benchmark.op in args.op]
    every = [[(b, case) for case in (b.smoke(args.device) if args.smoke else b.cases(args.device, args.full))] for b in chosen]
    known = {case.grid for cases in every for _, case in cases}
    if unknown := set(args.grid) - known:
        sys.exit(f"--grid: no {', '.join(sorted(unknown))} here; choose from {', '.join(sorted(known))}")
    mixed = (pair for row in itertools.zip_longest(*every) for pair in row if pair is not None)
    return [(benchmark, case) for benchmark, case in mixed if not args.grid or case.grid in args.grid]


def begin(args: argparse.Namespace, found: Found, command: str) -> dict[str, Any]:
    """Results without new rows. They include what the --json file already has of this device, and its highest peak rates."""
    dtypes = list(dict.fromkeys(case.dtype for _, case in found))
    machine, rates = describe(args.device), ceilings(args.device, dtypes, args.ceiling_size)
    results: dict[str, Any] = {"machine": machine, "ceilings": rates, "command": command, "rows": []}
    if args.json and args.json.exists():
        before = results_file.load(args.json)
        if all(before["machine"].get(name, machine[name]) == machine[name] for name in ("device", "instructions")):
            fastest = {name: max(rate, rates.get(name, 0.0)) for name, rate in before["ceilings"].items()}
            commands = dict.fromkeys([*before["command"].split(AND), command])
            results = before | results | {"ceilings": rates | fastest, "rows": before["rows"], "command": AND.join(commands)}
    return results


def run(
    found: Found,
    rates: dict[str, float],
    effort: Effort,
    deadline: float,
    write: Callable[[list[Row]], None],
    alone: bool,
) -> Iterator[list[Row]]:
    """The rows of each case. A case that fails as a whole, or would start after the deadline, has one row with the reason.

    Args:
        write: is called with the rows of a case so far.
        alone: without the baselines.
    """
    for benchmark, case in found:
        if time.monotonic() >= deadline:
            yield [blank(case, benchmark.ours, results_file.OUT_OF_TIME)]
            continue
        baselines = [] if alone else benchmark.candidates(case)
        try:
            if benchmark.compare:
                yield benchmark.compare(case, benchmark.ours, baselines, rates, effort)
            else:
                yield compare(case, benchmark.ours, baselines, rates, effort, write)
        except Exception as error:
            row = blank(case, benchmark.ours, as_note(error))
            row.is_ours = True
            yield [row]


def show(found: Found) -> None:
    for benchmark, case in found:
        print(f"\n{case.grid}: {case}")
        for candidate in (benchmark.ours, *benchmark.candidates(case)):
            print(f"  {candidate.name:<48} {candidate.why_not(case) or candidate.version}")
