"""A model that multiplies 3 x 2 digits with a chain of 10 tokens loses the chain token by token, from its beginning. There are
81,000 such problems, so that training on 40,000 rows can't show a small model most of the answers. The controls have as many
updates: one never had a chain, and one has learnt the same chains and loses the whole chain at once.

In the quick size there are 3,750 updates of 64 rows: 700 with the chain, 200 after each token that is removed, and 1,250
without a chain. What follows a removed token keeps its position, in the control too. Runs that begin with chains share the
model that has learnt them. Accuracy is exact match of greedy answers to test problems, by the best model of the last stage.
Time makes up for the order in part: with 250 updates per token, the run that lost its chain at once had 0.49 after 3,500
updates without it, where the other one had 0.71 (one seed).

The full size has 3 x 3 digits, with a chain of 24 tokens, and leaves out the parts of the recipe one at a time: kept positions,
removal smoothing, the optimizer's reset, the slow schedule, and the order from the left.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from experiments_checks import figure, gaps, least

from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.saving import load_model
from quietstar_recipes.internalize import stepwise as icot
from quietstar_recipes.tasks import Multiplication

TITLE = "Stepwise internalisation"
CLAIM = "Removed token by token, a chain is internalised; removed at once, or never learnt, it isn't."
WHOLE = "the whole chain"
STEPWISE, DIRECT, ABRUPT = "token by token", "no chain ever", "all at once"
RUNS: dict[str, dict[str, Any]] = {STEPWISE: {}, DIRECT: {"remove_all_beyond": 0}, ABRUPT: {"remove_all_beyond": 1}}
# The parts of the recipe, left out one at a time. Positions can't be kept where the right side goes first.
ABLATIONS: dict[str, dict[str, Any]] = {
    "positions not kept": {"keep_position": False},
    "no smoothing": {"smoothing": math.inf},
    "no reset": {"reset_optimizer": False},
    "four times as fast": {"faster": 4},
    "right side first": {"keep_position": False, "side": "right"},
}
DIGITS = {"tiny": (2, 1), "quick": (3, 2), "full": (3, 3)}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"explicit_steps": 0, "steps_per_token": 1, "final_steps": 2, "held_out": 10, "rows": 100},
    "quick": {"explicit_steps": 700, "steps_per_token": 200, "final_steps": 1250, "held_out": 400, "rows": 40_000},
    "full": {"explicit_steps": 2000, "steps_per_token": 450, "final_steps": 3000, "held_out": 1000, "rows": 200_000},
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    task = Multiplication(*DIGITS[size])
    tokens = len(task.sample(1, "train", torch.Generator())[0].cot_ids)
    result: dict[str, Any] = {"rows": [], "stages": {}, "digits": {}}
    taught = out / folder(STEPWISE) / icot.STAGES / "removed-000"
    for name, options in (RUNS if size != "full" else RUNS | ABLATIONS).items():
        model = small_model(task, seed=seed)
        if name not in (STEPWISE, DIRECT):
            model = load_model(taught, model)
        steps = schedule(options, SIZES[size], tokens, taught=name not in (STEPWISE, DIRECT))
        config = icot.Config(out=str(out / folder(name)), seed=seed, **{"keep_position": True, **steps})
        _, report = icot.internalize(model, task, config, resume=True)
        if name == STEPWISE:
            result |= {"rows": [line(WHOLE, report["full chain"])], "training": report["training"]}
            result["digits"][WHOLE] = report["full chain"]["digits"]
        result["rows"].append(line(name, report["internalized"]))
        result["digits"][name] = report["internalized"]["digits"]
        if len(report["stages"]) == tokens + 1:
            columns = ("removed", "accuracy", "problems_per_second")
            result["stages"][name] = [{key: stage[key] for key in columns} for stage in report["stages"]]
    return result


def folder(run: str) -> str:
    return run.replace(" ", "-")


def line(run: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {"run": run} | {key: figures[key] for key in ("accuracy", "tokens", "problems_per_second", "tokens_per_second")}


def schedule(options: dict[str, Any], size: dict[str, int], tokens: int, taught: bool) -> dict[str, Any]:
    """As many updates for each run: those not spent on other stages are spent on the last one.

    Args:
        tokens: in a chain.
        taught: whether the model has learnt the chains before.
    """
    options = dict(options)
    explicit, per_token = size["explicit_steps"], size["steps_per_token"]
    left = (tokens - 1) * per_token + size["final_steps"]
    if "remove_all_beyond" not in options:
        per_token = max(1, per_token // options.pop("faster", 1))
        left -= (tokens - 1) * per_token
    if options.get("remove_all_beyond") == 0:
        left += explicit
    steps = {"explicit_steps": 0 if taught else explicit, "steps_per_token": per_token, "final_steps": left}
    return {**size, **steps, **options}


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = gaps(CLAIM, results, STEPWISE, (DIRECT, ABRUPT), 0.25)
    return [
        *found,
        least("the smallest of these gaps in any seed", [min(value for one in found for value in one["values"])], 0.25),
        least("the model with the whole chain", [figure(result, WHOLE) for result in results], 0.95),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    stages = {  # of each run that loses its chain token by token
        name: [[(stage["removed"], stage["accuracy"]) for stage in result["stages"][name]] for result in results]
        for name in results[0]["stages"]
    }
    runs = [row["run"] for row in results[0]["rows"]]
    speeds = {run: [[(figure(result, run, "problems_per_second"), figure(result, run))] for result in results] for run in runs}
    training = [result["training"] for result in results]
    marks = [a["step"] for a, b in zip(training[0], training[0][1:], strict=False) if a["removed"] != b["removed"]]
    losses = {
        name.replace("_", " "): [[(part["step"], part[name]) for part in seed] for seed in training]
        for name in ("first_token_loss", "loss")
    }
    digits = {name: [list(enumerate(result["digits"][name], 1)) for result in results] for name in results[0]["digits"]}
    bars = {run: [figure(result, run) for result in results] for run in runs}
    panels(
        path,
        TITLE,
        [
            Panel("tokens of the chain that are gone", "accuracy on held-out problems", stages),
            Panel("problems a second", "accuracy on test problems", speeds),
            Panel(f"update, {STEPWISE}", "training loss, nats", losses, marks=marks),
            Panel("digit of the answer, units first", "accuracy on test problems", digits),
            Panel("accuracy on test problems", "", bars=bars),
        ],
    )
    return (
        "Accuracy at the end of each stage, against the tokens removed; accuracy and speed after training; the training "
        "loss, with a line where a token is removed; accuracy of each digit of the answer, and of whole answers. Thin lines "
        "and small dots are seeds, thick lines, large dots and bars their mean"
    )
