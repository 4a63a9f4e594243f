"""Quiet-STaR where thinking must help, with every control: sums.py says what the task is and how Quiet-STaR is used.

Thoughts can be asides of either kind or anything else, and the only reward is a better prediction of the next token. Every
control starts from the same model: no thoughts, pause tokens or random digits as thoughts, another line's thoughts, thoughts
without REINFORCE, a frozen language model.

    python examples/digit_sums.py --quick --threads 2   one seed, every position thinks, some controls: a minute or two
    python examples/digit_sums.py --seeds 5             every run and control of docs/results.md: twelve minutes a seed
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sums  # before torch: it sets environment variables that torch reads
import torch
from sums import AT_EQUALS, EQUALS_ONLY, EVERYWHERE, PAUSE, STEPS, TEST_LINES, Setting, own_thoughts, predict, score, think_with
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import LlamaForCausalLM
from transformers.utils import logging

from quietstar import QuietStar
from quietstar.evaluation.intervals import mean_gains
from quietstar.run.processes import Interrupted
from quietstar.training import thought_loss

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import digit_sums_report as report  # noqa: E402, the tables, plots and pages
from digit_sums_report import SHUFFLED, exact_match  # noqa: E402

QUICK_LINES, QUICK_PRETRAINING = 1024, 450
CURVE_LINES = 256  # held-out lines of the learning curve


@dataclass(frozen=True)
class Run:
    """Quiet-STaR, or a control that changes one part of it.

    Attributes:
        thoughts: "own" for sampled thoughts; "pause" tokens or "random" digits in their place.
        reinforce: False sets the policy weight to 0.
        frozen: only the mixing head is trained.
        rehearsal: every step also trains on 64 lines of the pretraining text.
        embedding_scale: the start and end vectors are stored divided by this, which multiplies their learning rate.
    """

    name: str
    thoughts: str = "own"
    reinforce: bool = True
    frozen: bool = False
    rehearsal: bool = False
    embedding_scale: float = 1.0

    def wrap(self, model: LlamaForCausalLM, setting: Setting, seed: int) -> QuietStar:
        fields = {} if self.reinforce else {"policy_weight": 0}
        return think_with(model, setting, seed, embedding_scale=self.embedding_scale, **fields)


QUIET_STAR = Run("Quiet-STaR")
FROZEN = Run("frozen model, mixing head trained", reinforce=False, frozen=True)
NO_REINFORCE = Run("no REINFORCE", reinforce=False)
NO_REINFORCE_REHEARSED = Run("no REINFORCE, with rehearsal", reinforce=False, rehearsal=True)
REHEARSED = Run("Quiet-STaR with rehearsal", rehearsal=True)
PAUSES = Run("pause tokens as thoughts", thoughts="pause", reinforce=False)
RANDOM = Run("random digits as thoughts", thoughts="random", reinforce=False)
OFFICIAL_SCALE = Run("Quiet-STaR, start and end stored at 1/100", embedding_scale=100.0)

# Controls that need no training with thoughts, beside SHUFFLED.
PLAIN = "plain language model, 4 times the batch"
FORCED = "untrained thoughts, w = 1"

QUICK_RUNS = {replace(EVERYWHERE, steps=100): (QUIET_STAR, FROZEN)}
ALL_RUNS = {
    EQUALS_ONLY: (QUIET_STAR, FROZEN, NO_REINFORCE, NO_REINFORCE_REHEARSED, REHEARSED, PAUSES, RANDOM, OFFICIAL_SCALE),
    EVERYWHERE: (QUIET_STAR, FROZEN, NO_REINFORCE, NO_REINFORCE_REHEARSED, REHEARSED, PAUSES, RANDOM),
}


def run_seed(
    seed: int, runs: dict[Setting, tuple[Run, ...]], out: Path, pretraining_steps: int = 600, test_lines: int = TEST_LINES
) -> dict[str, Any]:
    """Pretrain, pass the gate, train every run from the same model; returns everything measured, as plain numbers."""
    began = time.perf_counter()
    strings, held_out = sums.split_strings(seed)
    digits = held_out[:test_lines]
    model, gate = sums.pretrain(strings, held_out, seed, pretraining_steps)
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
                before = run.wrap(model, setting, seed)
                add(setting, FORCED, **evaluate(before, run, digits, seed, forced=True))
                result["thoughts"][setting.name] = some_thoughts(before, qs, held_out[-8:], seed)
                if setting.name == EVERYWHERE.name:
                    result["positions"] = measure_positions(qs, digits, seed)
        add(setting, PLAIN, **sums.train_plain(model, setting, strings, digits, seed))
    result["seconds"] = time.perf_counter() - began
    return {**result, "checks": check(result)}


# Training of each run.


def train_thoughts(
    model: LlamaForCausalLM, setting: Setting, run: Run, strings: Tensor, held_out: Tensor, seed: int, out: Path
) -> tuple[QuietStar, dict[str, Any]]:
    """A trained copy of ``model``, with its seconds and its learning curve."""
    qs = run.wrap(model, setting, seed)
    if run.frozen:
        qs.requires_grad_(False)
        qs.mixing_head.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    drawn = sums.draw(strings, setting.lines * setting.steps, generator)
    shape = (len(drawn), len(setting.anchors), setting.thoughts, STEPS)
    lines = sums.DirectLines(drawn, setting, None if run.thoughts == "own" else given_thoughts(run.thoughts, shape, generator))
    loss = sums.with_rehearsal(strings, sums.mixed_lines) if run.rehearsal else thought_loss
    curve_digits = held_out[TEST_LINES : TEST_LINES + CURVE_LINES]
    began = time.perf_counter()
    metrics = sums.train_to_think(
        qs, lines, setting, out, seed, loss=loss, evaluate=lambda qs: curve_point(qs, run, curve_digits, seed)
    )
    seconds = time.perf_counter() - began
    names = ("step", "eval_exact_match", "eval_right_thoughts")
    curve = [{name.removeprefix("eval_"): line[name] for name in names} for line in metrics if "eval_exact_match" in line]
    return qs.eval(), {"seconds": seconds, "curve": curve}


def given_thoughts(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Thoughts that no model wrote: "pause" tokens or "random" digits."""
    if kind == "pause":
        return torch.full(shape, PAUSE)
    return torch.randint(10, shape, generator=generator)


# How well a run answers on held-out lines, with one thought per position, and where and what it thinks.


def thoughts_of(qs: QuietStar, run: Run, digits: Tensor, seed: int | None) -> Tensor:
    """Thoughts at "=" of the run's kind [lines,1,1,4]; its own are greedy without a seed."""
    if run.thoughts == "own":
        return own_thoughts(qs, digits, seed=seed)
    return given_thoughts(run.thoughts, (len(digits), 1, 1, STEPS), torch.Generator().manual_seed(seed or 0))


def curve_point(qs: QuietStar, run: Run, digits: Tensor, seed: int) -> dict[str, float]:
    """A point of the learning curve: the shares of exact matches and of right thoughts, greedy if they are its own."""
    thoughts = thoughts_of(qs, run, digits, None)
    result = score(predict(qs, digits, thoughts).mixed, digits)
    return {"exact_match": result["right"] / result["lines"], "right_thoughts": sums.right_thoughts(thoughts, digits)}


def evaluate(qs: QuietStar, run: Run, digits: Tensor, seed: int, forced: bool = False) -> dict[str, Any]:
    """Scores with sampled thoughts and, if they are the model's own, with greedy ones; ``forced`` sets w to 1."""
    thoughts = {"sampled": thoughts_of(qs, run, digits, seed)}
    if run.thoughts == "own":
        thoughts["greedy"] = thoughts_of(qs, run, digits, None)
    row: dict[str, Any] = {}
    for how, ids in thoughts.items():
        prediction = predict(qs, digits, ids)
        row[how] = score(prediction.thought if forced else prediction.mixed, digits)
    if run.thoughts == "own":
        row["right_thoughts"] = sums.right_thoughts(thoughts["sampled"], digits)
        row["distinct_thoughts"] = len(thoughts["greedy"].flatten(1).unique(dim=0))
    return row


def measure_gain(qs: QuietStar, digits: Tensor) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Scores with another line's greedy thoughts at "=", and the gain of the own ones in its two parts, nats."""
    own = own_thoughts(qs, digits)
    with_own, with_another = predict(qs, digits, own), predict(qs, digits, own.roll(1, 0))
    answers = sums.running_sums(digits)[:, -1]
    ways = (with_own.base, with_own.mixed, with_another.mixed)
    losses = (nll_loss(x[:, 0], answers, reduction="none").double() for x in ways)
    return score(with_another.mixed, digits), mean_gains(*losses)


def measure_positions(qs: QuietStar, digits: Tensor, seed: int) -> dict[str, list[float]]:
    """Mean mixing weight and mean gain (nats) at each position of a line, with sampled thoughts."""
    weights, gains = [], []
    for some in digits.split(512):
        prediction = predict(qs, some, own_thoughts(qs, some, EVERYWHERE.anchors, seed), EVERYWHERE.anchors)
        following = sums.direct_lines(some)[:, 1:]
        base, mixed = (nll_loss(x.transpose(1, 2), following, reduction="none") for x in (prediction.base, prediction.mixed))
        weights.append(prediction.weight)
        gains.append(base - mixed)
    return {"w": torch.cat(weights).mean(0).tolist(), "gain": torch.cat(gains).mean(0).tolist()}


def some_thoughts(before: QuietStar, after: QuietStar, digits: Tensor, seed: int) -> list[dict[str, Any]]:
    """Sampled thoughts at "=" of a few lines, before and after training, as text."""
    first, last = (own_thoughts(qs, digits, seed=seed)[:, 0, 0] for qs in (before, after))
    prediction = predict(after, digits, last[:, None, None])
    base, mixed = (x[:, 0].softmax(-1) for x in (prediction.base, prediction.mixed))
    right = sums.running_sums(digits)
    return [
        {
            "line": sums.as_text(sums.direct_lines(digits)[i, : AT_EQUALS + 1]),
            "before": sums.as_text(first[i]),
            "after": sums.as_text(last[i]),
            "right": sums.as_text(right[i]),
            "answer": sums.as_text(answer),
            "p_without": base[i, answer].item(),
            "p_with": mixed[i, answer].item(),
            "w": prediction.weight[i, 0].item(),
        }
        for i, answer in enumerate(right[:, -1:])
    ]


# The claims of docs/results.md about one seed, each with what was measured and whether it holds.


def check(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All checks on the result of a seed; those of runs that were left out are left out too."""
    gate, checks = result["pretraining"], []

    def bound(setting: str, what: str, value: float, least: float | None = None, most: float | None = None) -> None:
        passed = value >= least if least is not None else value <= most
        wanted = f">= {least}" if least is not None else f"<= {most}"
        checks.append({"setting": setting, "what": what, "value": value, "wanted": wanted, "passed": passed})

    bound("pretraining", "probability of a right step after right ones", min(gate["steps_right"][1:]), sums.RIGHT_STEPS)
    bound("pretraining", "right thoughts before training", gate["right_thoughts"], sums.RIGHT_THOUGHTS)
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        rows = {row["run"]: row for row in result["rows"] if row["setting"] == setting}
        trained, alone = rows[QUIET_STAR.name], setting == EQUALS_ONLY.name
        bound(setting, "Quiet-STaR, greedy", exact_match(trained, "greedy"), 0.9 if alone else 0.8)
        bound(setting, SHUFFLED, exact_match(rows[SHUFFLED], "greedy"), most=0.15)
        rivals = [exact_match(rows[run.name], "sampled") for run in (FROZEN, NO_REINFORCE_REHEARSED) if run.name in rows]
        if rivals:
            lead = exact_match(trained, "sampled") - max(rivals)
            bound(setting, "Quiet-STaR, above the best use of thoughts without REINFORCE", lead, 0.35)
        if alone:
            bound(setting, "Quiet-STaR, sampled", exact_match(trained, "sampled"), 0.85)
            bound(setting, "Quiet-STaR, sampled: loss", trained["sampled"]["nll"], most=0.6)
        for name in (name for name in (PAUSES.name, RANDOM.name, PLAIN) if name in rows):
            bound(setting, name, exact_match(rows[name], "sampled"), most=0.15)
            bound(setting, f"{name}: loss", rows[name]["sampled"]["nll"], 2.2)
    if result["positions"]:
        *before, at_equals, after = result["positions"]["w"]
        bound(EVERYWHERE.name, 'mixing weight at "="', at_equals, 0.3)
        bound(EVERYWHERE.name, "largest mixing weight elsewhere", max(map(abs, [*before, after])), most=0.15)
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="run everything for seeds 0 to SEEDS-1; default 1")
    parser.add_argument(
        "--quick", action="store_true", help="a thought at every position, fewer steps and lines, some controls"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/digit_sums"), help="folder for results and plots")
    parser.add_argument("--resume", action="store_true", help="keep the seeds already in the results.json of --out")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default 1: more only speed up pretraining")
    parser.add_argument("--docs", type=Path, help="also write the table in results.md, plots and numbers of this folder")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a threshold is missed")
    options = parser.parse_args()
    if options.docs and options.quick:
        parser.error("--docs is about all runs: leave out --quick")
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results = {"quick": options.quick, **report.describe_machine()}
    try:
        if options.resume:
            results["seeds"] = report.earlier_seeds(file, results)
    except ValueError as error:
        parser.error(str(error))
    done = {seed["seed"] for seed in results["seeds"]}
    for seed in range(options.seeds):
        if seed not in done:
            quick = {"pretraining_steps": QUICK_PRETRAINING, "test_lines": QUICK_LINES} if options.quick else {}
            results["seeds"].append(run_seed(seed, QUICK_RUNS if options.quick else ALL_RUNS, options.out, **quick))
            report.write_json(results, file)
    report.show(results, options.out)
    if options.docs:
        report.write_docs(results, options.docs)
    failed = any(not check["passed"] for seed in results["seeds"] for check in seed["checks"])
    return 1 if failed and options.strict else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        print("\nStopped. Finished seeds are in results.json; --resume continues after them.")
        sys.exit(130)
