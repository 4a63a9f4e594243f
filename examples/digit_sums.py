"""Quiet-STaR where thinking must help: the last digit of a sum, which a small model can't compute in one step but can in five.

A line is five digits and the last digit of their sum: 7 5 8 6 2 = 8. A small Llama is first trained on lines of three kinds,
most of which have an aside before the answer:

    7 5 8 6 2 = 8                  the answer alone, 40 % of the lines
    7 5 8 6 2 = - 2 0 6 8 - 8      an aside of running sums, which helps: 24 %
    7 5 8 6 2 = - 7 5 8 6 - 8      an aside that repeats the digits, which doesn't: 36 %

Then Quiet-STaR trains it on lines without an aside. Its thoughts can be asides of either kind or anything else, and the only
reward is a better prediction of the next token. Every control starts from the same model: no thoughts, pause tokens or random
digits as thoughts, another line's thoughts, thoughts without REINFORCE, a frozen language model.

    python examples/digit_sums.py --quick --threads 2   one seed, every position thinks, some controls: about two minutes
    python examples/digit_sums.py --seeds 5             every run and control of docs/results.md: twelve minutes a seed

To see how Quiet-STaR is used, read sums/quiet_star.py. sums/__init__.py lists the other parts.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import sums.report as report  # before torch: sums sets environment variables that torch reads
import torch
from sums.docs_page import write_docs
from sums.evaluation import evaluate, measure_gain, measure_positions, some_thoughts
from sums.pretraining import pretrain
from sums.quiet_star import think_with
from sums.results import describe_machine, earlier_seeds, read_results, write_json
from sums.runs import ALL_RUNS, EVERYWHERE, FORCED, PLAIN, QUICK_RUNS, QUIET_STAR, SHUFFLED, Run, Setting
from sums.task import TEST_LINES, split_strings
from sums.thresholds import check
from sums.training import train_plain, train_thoughts
from transformers.utils import logging

from quietstar.run.processes import Interrupted

QUICK_LINES = 1024


def run_seed(
    seed: int, runs: dict[Setting, tuple[Run, ...]], out: Path, pretraining_steps: int = 600, test_lines: int = TEST_LINES
) -> dict[str, Any]:
    """Pretrain, pass the gate, train every run from the same model; returns everything measured, as plain numbers."""
    began = time.perf_counter()
    strings, held_out = split_strings(seed)
    digits = held_out[:test_lines]
    model, gate = pretrain(strings, held_out, seed, pretraining_steps)
    report.print_gate(seed, gate)
    result: dict[str, Any] = {"seed": seed, "pretraining": gate, "rows": [], "gains": {}, "positions": None, "thoughts": {}}

    def add(setting: Setting, name: str, **row: Any) -> None:
        result["rows"].append({"setting": setting.name, "run": name, **row})
        report.print_row(seed, result["rows"][-1])

    for setting in runs if gate["passed"] else ():
        for run in runs[setting]:
            folder = out / f"seed-{seed}" / re.sub(r"\W+", "-", f"{setting.name} {run.name}")
            qs, training = train_thoughts(model, setting, run, strings, held_out, seed, folder)
            add(setting, run.name, **evaluate(qs, run, digits, seed), **training)
            if run is QUIET_STAR:
                scores, result["gains"][setting.name] = measure_gain(qs, digits)
                add(setting, SHUFFLED, greedy=scores)
                before = think_with(model, setting, run, seed)
                add(setting, FORCED, **evaluate(before, run, digits, seed, forced=True))
                result["thoughts"][setting.name] = some_thoughts(before, qs, held_out[-8:], seed)
                if setting.name == EVERYWHERE.name:
                    result["positions"] = measure_positions(qs, digits, seed)
        add(setting, PLAIN, **train_plain(model, setting, strings, digits, seed))
    result["seconds"] = time.perf_counter() - began
    return {**result, "checks": check(result)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="run everything for seeds 0 to SEEDS-1; default 1")
    parser.add_argument(
        "--quick", action="store_true", help="a thought at every position, fewer steps and lines, some controls"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/digit_sums"), help="folder for results, plots and page.html")
    parser.add_argument("--resume", action="store_true", help="keep the seeds already in the results.json of --out")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default 1: more only speed up pretraining")
    parser.add_argument("--docs", type=Path, help="also write the table in results.md, plots and numbers of this folder")
    parser.add_argument("--results", type=Path, help="train nothing; show the results.json of an earlier run")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a threshold is missed")
    options = parser.parse_args()
    if options.docs and options.quick:
        parser.error("--docs is about all runs: leave out --quick")

    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.results:
        try:
            results = read_results(options.results)
        except ValueError as error:
            parser.error(str(error))
    else:
        results = {"quick": options.quick, **describe_machine()}
        if options.resume:
            try:
                results["seeds"] = earlier_seeds(options.out / "results.json", results)
            except ValueError as error:
                parser.error(str(error))
        done = {seed["seed"] for seed in results["seeds"]}
        runs, lines = (QUICK_RUNS, QUICK_LINES) if options.quick else (ALL_RUNS, TEST_LINES)
        for seed in range(options.seeds):
            if seed not in done:
                results["seeds"].append(run_seed(seed, runs, options.out, test_lines=lines))
                write_json(results, options.out / "results.json")
    report.show(results, options.out)
    if options.docs:
        write_docs(results, options.docs)
    failed = any(not check["passed"] for seed in results["seeds"] for check in seed["checks"])
    return 1 if failed and options.strict else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        print("\nStopped. Finished seeds are in results.json; --resume continues after them.")
        sys.exit(130)
