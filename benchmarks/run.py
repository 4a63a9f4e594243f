"""Run the benchmarks: every op against what people use without it, checked for equal results, then timed in turn.

    make bench                                               all ops, a default grid, under five minutes
    python benchmarks/run.py --full                          the whole grid, up to where dense masks die
    python benchmarks/run.py --op thought_attention          one op
    python benchmarks/run.py --grid headline text            the headline cases and those that vary the text's length
    python benchmarks/run.py --list                          cases, peers, and why a peer can't run here
    python benchmarks/run.py --op sample_token --json a.json the rows into a file

It measures the machine's ceilings first, a copy and a matmul, so that every row can say how far from the floor it is. A run of
all ops and grids writes benchmarks/results/<device>.md, .json and, with matplotlib, .png; a narrower one what --json names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
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
from case import Case  # noqa: E402
from compare import FULL, QUICK, Effort, Row, blank, compare, said  # noqa: E402
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
    dtypes = list(dict.fromkeys(case.dtype for _, case in found))
    results: dict[str, Any] = {
        "machine": describe(args.device),
        "ceilings": ceilings(args.device, dtypes, args.ceiling_size),
        "command": " ".join(["python benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]),
        "rows": [],
    }
    print(report.device_lines(results)[2], flush=True)
    for rows in run(found, results["ceilings"], FULL if args.full else QUICK, began + 60 * args.minutes):
        rows = [row.as_dict() for row in rows]
        results["rows"] = in_order([*results["rows"], *rows])
        report.print_case(rows)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    report.print_goals(args.device.type, results["rows"])
    if args.results or not (args.op or args.grid or args.smoke):
        print(f"\nWritten: {report.write(results, args.results or report.RESULTS)}")
    failed = [row for row in results["rows"] if row["is_ours"] and row["seconds"] is None]
    print(f"{len(found)} cases in {(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        sys.exit("\n".join(f"{report.case_of(row)}: {row['candidate']}: {row['note']}" for row in failed))


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
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each case")
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
    found: Sequence[tuple[ModuleType, Case]], rates: dict[str, float], effort: Effort, deadline: float
) -> Iterator[list[Row]]:
    """The rows of each case; a case that fails as a whole, or comes after the deadline, has one row that says so."""
    for module, case in found:
        if time.monotonic() >= deadline:
            yield [blank(case, module.OURS, "not run: out of time")]
            continue
        try:
            yield getattr(module, "compare", compare)(case, module.OURS, module.candidates(case), rates, effort)
        except Exception as error:
            row = blank(case, module.OURS, said(error))
            row.is_ours = True
            yield [row]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By op, cases in the order in which they ran."""
    return sorted(rows, key=lambda row: list(MODULES).index(row["op"]))


def show(found: Sequence[tuple[ModuleType, Case]]) -> None:
    for module, case in found:
        print(f"\n{case.grid}: {case}")
        for peer in (module.OURS, *module.candidates(case)):
            print(f"  {peer.name:<40} {peer.why_not(case) or peer.version}")


if __name__ == "__main__":
    main()
