"""STaR learns from its own chains, and rationalisation decides how far it comes: with it, in four seeds of five, most sums of
four digits, of which the base solves none; without it, none. STaR on its authors' problems: sums of two numbers of one to five
digits, with a scratchpad. The base has learnt to write a scratchpad towards an answer that it is shown, for sums of all
lengths; without it, for sums of one and two digits. So what rationalisation brings out was practised: right scratchpads of long
sums, with the answer shown. Training on as many of these without the answer is not among the controls.

It is a Llama, whose positions are relative. With learned positions, as GPT-2 has them, such a base takes three times as many
updates. There are two rounds, so "3 rounds to half of 3 digits" means never. In the ablations, one seed, rehearsal of hints
raises the accuracy from 0.63 to 0.72, and going on from the latest model, where the recipe starts again from the base in each
round, from there to 0.91.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from experiments_claims import Claim
from small_base import relative_model
from transformers import PreTrainedModel

from quietstar.run.batches import mix_seed
from quietstar_recipes.common.evaluation import evaluate
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.training import SFTConfig, sft
from quietstar_recipes.star import Config, star
from quietstar_recipes.tasks import Scratchpad, Task

TITLE = "STaR"
DIGITS = 5
ROUNDS = "rounds_to_half_of_3_digits"
MAX_NEW = 4 * DIGITS + DIGITS + 3  # scratchpad, mark, sum, end
HINTED = 0.5  # share of the base's training sums that show the answer; these are of all lengths
SHORT, LONG = ("1 digit", "2 digits"), 0.02  # the lengths of the others, and the share of longer ones among which they are
PIECES, PIECE, ENOUGH = 30, 50, 0.8  # the base's updates, until it solves this share of short sums; seeds differ
RATIONALISED, PLAIN, NO_FILTER, DIRECT = "rationalised", "not rationalised", "no filter", "direct answers"
REHEARSED = "not rationalised, rehearsal"
RUNS: dict[str, dict[str, Any]] = {
    RATIONALISED: {"rationalize": True},
    PLAIN: {},
    REHEARSED: {"hint_rehearsal": 0.5},
    NO_FILTER: {"filter": False},
}
MORE_RUNS: dict[str, dict[str, Any]] = {  # of size full
    "rationalised, rehearsal": {"rationalize": True, "hint_rehearsal": 0.5},
    "rationalised, rehearsal, no restart": {"rationalize": True, "hint_rehearsal": 0.5, "restart": False},
    "rationalised, rehearsal, right chains": {"rationalize": True, "hint_rehearsal": 0.5, "rationale_check": "chain"},
    "not rationalised, temperature 1": {"temperature": 1.0},
}
CLAIMS = (
    Claim(
        "With rationalisation, more sums of four digits are right than without it.",
        RATIONALISED,
        (PLAIN, REHEARSED, NO_FILTER, DIRECT),
        "4_digits",
    ),
    Claim(
        "Learning from right chains of its own beats learning from answers alone, and from all its chains.",
        RATIONALISED,
        (DIRECT, NO_FILTER, "base"),
    ),
)
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"rounds": 1, "problems": 60, "steps": 2, "test_problems": 20, "valid_problems": 10},
    "quick": {"rounds": 2, "problems": 2000, "steps": 300, "test_problems": 500, "valid_problems": 50},
    "full": {"rounds": 5, "problems": 2000, "steps": 300, "test_problems": 1000, "valid_problems": 50},
}
TRAINING = {"learning_rate": 1e-3, "warmup": 20, "batch_tokens": 1600}


def base(seed: int, size: str) -> tuple[PreTrainedModel, Task]:
    """A model of 0.4 million weights that solves most short sums, and the task."""
    task = Scratchpad(DIGITS)
    model = relative_model(task, seed=seed)
    generator = torch.Generator().manual_seed(mix_seed(seed, 1000))
    rows = task.sample(200 if size == "tiny" else 12000, "train", generator)
    hinted, long = (torch.rand(len(rows), generator=generator).tolist() for _ in range(2))
    examples = [(row.hinted_ids, task.completion_ids(row)) for row, x in zip(rows, hinted, strict=True) if x < HINTED]
    examples += [
        (row.prompt_ids, task.completion_ids(row))
        for row, x, y in zip(rows, hinted, long, strict=True)
        if x >= HINTED and (row.problem.kind in SHORT or y < LONG)
    ]
    held_out = [row for row in task.sample(500, "valid", generator) if row.problem.kind in SHORT]
    config = SFTConfig(**TRAINING)
    for piece in range(1 if size == "tiny" else PIECES):
        sft(model, examples, 5 if size == "tiny" else PIECE, config, mix_seed(seed, piece))
        config.warmup = 0
        if evaluate(model, task, held_out, MAX_NEW)["accuracy"] >= ENOUGH:
            break
    return model, task


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, task = base(seed, size)
    result: dict[str, Any] = {"rows": [], "by_digits": {}}
    for name, options in (RUNS | (MORE_RUNS if size == "full" else {})).items():
        config = Config(
            out=str(out / name.replace(", ", "-").replace(" ", "-")),
            filter=size != "tiny" and options.get("filter", True),  # a base of five updates solves nothing
            **{k: v for k, v in options.items() if k != "filter"},
            **SIZES[size],
            **TRAINING,
            growth=1.1,
            max_new=MAX_NEW,
            seed=seed,
        )
        _, reports = star(copy.deepcopy(model), task, config, resume=True)
        if not result["rows"]:
            result["rows"].append({"run": "base", **figures(reports[0])})
        by_digits = [list(report["by_kind"].values()) for report in reports]
        solved = (number for number, accuracies in enumerate(by_digits) if accuracies[2] >= 0.5)
        # A run that never gets there is counted as one round too long.
        result["rows"].append({"run": name, ROUNDS: next(solved, len(reports)), **figures(reports[-1])})
        result["by_digits"][name] = by_digits
    updates = sum(report["steps"] for report in reports[1:])
    result["rows"].append({"run": DIRECT, **direct_answers(model, task, seed, SIZES[size], updates)})
    return result


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a round, or of an evaluation."""
    keys = ("accuracy", "kept", "rationalised", "kept_chain_right", "rationalised_chain_right")
    by_digits = {kind.replace(" ", "_"): accuracy for kind, accuracy in report["by_kind"].items()}
    return {key: report[key] for key in keys if key in report} | by_digits


def direct_answers(model: PreTrainedModel, task: Task, seed: int, sizes: dict[str, int], updates: int) -> dict[str, Any]:
    """Fine-tuning on the answers of as many problems as all rounds of STaR try, for as many updates as they take together."""
    generator = torch.Generator().manual_seed(mix_seed(seed, 1001))
    rows = task.sample(sizes["rounds"] * sizes["problems"], "train", generator)
    examples = [(row.prompt_ids, task.direct_ids(row)) for row in rows]
    direct = sft(copy.deepcopy(model), examples, updates, SFTConfig(**TRAINING), seed)
    test = task.sample(sizes["test_problems"], "test", torch.Generator().manual_seed(mix_seed(seed, 0)))
    return figures(evaluate(direct, task, test, MAX_NEW))


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def over_rounds(length: int) -> dict[str, list[list[tuple[float, float]]]]:
        return {
            name: [[(i, digits[length - 1]) for i, digits in enumerate(result["by_digits"][name])] for result in results]
            for name in results[0]["by_digits"]
        }

    shown = [Panel("round", f"accuracy, {length} digits", over_rounds(length), share=True) for length in range(2, DIGITS + 1)]
    panels(path, TITLE, shown)
    return "Accuracy on test sums of each length after each round; thin lines are seeds, thick lines their mean"
