"""The command line of ``python -m benchmarks.run`` and of each ``python -m benchmarks.bench_<op>``."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import Candidate
from benchmarks.harness.case import Case
from benchmarks.harness.compare import FAILED, FULL, QUICK, SMOKE, Effort, Row, as_note, blank, check_device, compare
from benchmarks.harness.machine import ceilings, describe, device_name
from benchmarks.report import pages, results_file, tables, units
from benchmarks.report.results_file import NOT_REACHED, OUT_OF_TIME

AND = "` and `"  # between the commands of a results file that several runs have filled; a page shows them as code
OWN = "own sizes"  # the grid of --sizes
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
        return show(args, found)
    began = time.monotonic()
    print(f"{device_name(args.device)}: {units.count(len(found), 'case')}", flush=True)
    words = [parser.prog, *(sys.argv[1:] if argv is None else argv)]
    results = begin(args, [case.dtype for _, case in found], " ".join(words))
    print(tables.device_lines(results)[2], flush=True)
    measured, failed, mine = set(), {}, []

    def write(some: Sequence[Row]) -> None:
        """A failure doesn't replace what this run has measured, since a baseline may have taken the device down."""
        new = [row.as_dict() for row in some if row.seconds is not None or row.key not in measured]
        measured.update(row.key for row in some if row.seconds is not None)
        mine[:] = results_file.merged(mine, new, list(tables.TITLES))
        results["rows"] = results_file.merged(results["rows"], new, list(tables.TITLES))
        if args.json:
            results_file.save(results, args.json)

    write([waiting for benchmark, case in found for waiting in not_reached(args, benchmark, case)])
    effort = SMOKE if args.smoke else FULL if args.full else QUICK
    deadline = began + 60 * args.minutes
    for of_case in run(args, found, results["ceilings"], effort, deadline, write):
        write(of_case)
        tables.print_case([row.as_dict() for row in of_case])
        failed |= {row.key: row for row in of_case if row.is_ours and row.note.startswith(FAILED)}
    if not args.smoke:
        tables.print_goals(results | {"rows": mine})
    if args.results or not (args.op or args.grid or args.sizes or args.smoke or args.against is not None):
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


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.minutes is None:
        args.minutes = float("inf") if args.full else MINUTES
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return args


def select(benchmarks: Sequence[Benchmark], args: argparse.Namespace) -> list[tuple[Benchmark, Case]]:
    """The cases to run: the first of every op in the order of ``--op``, then the second, and so on, so that a time limit drops
    the least important."""
    chosen = [benchmark for op in args.op for benchmark in benchmarks if benchmark.op == op] or benchmarks
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
    rows = [blank(case, candidate, note) for candidate in (benchmark.ours, *baselines(args, benchmark, case))]
    rows[0].is_ours = True
    return rows


def begin(args: argparse.Namespace, dtypes: Sequence[torch.dtype], command: str) -> dict[str, Any]:
    """Results without new rows. They include what the --json file already has of this device, under the highest peak rates."""
    machine, rates = describe(args.device), ceilings(args.device, dtypes, args.ceiling_size)
    results: dict[str, Any] = {"machine": machine, "ceilings": rates, "command": command, "rows": []}
    if args.json and args.json.exists():
        before = results_file.load(args.json)
        if all(before["machine"].get(name, machine[name]) == machine[name] for name in ("device", "instructions")):
            rates |= {name: max(rate, rates.get(name, 0.0)) for name, rate in before["ceilings"].items()}
            rows = [results_file.under(rates, results_file.dated(row, before["machine"])) for row in before["rows"]]
            commands = dict.fromkeys([*before["command"].split(AND), command])
            results = before | results | {"ceilings": rates, "rows": rows, "command": AND.join(commands)}
    return results


def run(
    args: argparse.Namespace,
    found: Found,
    rates: dict[str, float],
    effort: Effort,
    deadline: float,
    write: Callable[[list[Row]], None],
) -> Iterator[list[Row]]:
    """The rows of each case. A case that fails as a whole, or would start after the deadline, has one row with the reason.

    Args:
        write: is called with the rows of a case so far.
    """
    for benchmark, case in found:
        if time.monotonic() >= deadline:
            yield not_reached(args, benchmark, case, OUT_OF_TIME)
            continue
        against = baselines(args, benchmark, case)
        try:
            yield (benchmark.compare or compare)(case, benchmark.ours, against, rates, effort, write)
        except Exception as error:
            check_device(case.device, error)
            row = blank(case, benchmark.ours, as_note(error))
            row.is_ours = True
            yield [row]


def show(args: argparse.Namespace, found: Found) -> None:
    for benchmark, case in found:
        print(f"\n{case.grid}: {case}")
        for candidate in (benchmark.ours, *baselines(args, benchmark, case)):
            print(f"  {candidate.name:<48} {candidate.why_not(case) or candidate.version}")
