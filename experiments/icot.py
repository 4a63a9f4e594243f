"""A model that multiplies 2 x 2 digits with a chain of 8 tokens loses the chain token by token. The controls have as many
updates: one never had a chain, and one loses the whole chain at once. The thresholds of the two controls come from a model that
learns more slowly.

In the quick size there are 4,500 updates of 64 rows: 1,500 with the chain, 250 after each token that is removed, and the rest
without a chain. Accuracy is exact match of greedy answers to test problems, by the best model of the last stage.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from experiments_checks import figure, least, most

from quietstar.recipes.common.models import small_model
from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.internalize import Config, internalize
from quietstar.recipes.tasks import Multiplication

TITLE = "Stepwise internalisation"
WHOLE = "the whole chain"
KEPT, CONTIGUOUS, DIRECT, ABRUPT = "positions kept", "stepwise", "no chain ever", "all at once"
RUNS: dict[str, dict[str, Any]] = {
    KEPT: {"keep_position": True},
    CONTIGUOUS: {},
    DIRECT: {"remove_all_beyond": 0},
    ABRUPT: {"remove_all_beyond": 1},
}
# The paper's ablations, one at a time. Positions are kept, except where the right side goes first, which can't keep them.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no smoothing": {"keep_position": True, "smoothing": math.inf},
    "no reset": {"keep_position": True, "reset_optimizer": False},
    "four times as fast": {"keep_position": True, "faster": 4},
    "right side first": {"side": "right"},
}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"explicit_steps": 0, "steps_per_token": 1, "final_steps": 2, "held_out": 10, "rows": 100},
    "quick": {"explicit_steps": 1500, "steps_per_token": 250, "final_steps": 1250, "held_out": 400},
    "full": {"explicit_steps": 2000, "steps_per_token": 500, "final_steps": 2500, "held_out": 800},
}
TOKENS = 8  # in a chain


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    task = Multiplication(2)
    runs = RUNS if size == "quick" else RUNS | ABLATIONS
    result: dict[str, Any] = {"rows": [], "stages": {}, "digits": {}}
    for name, options in runs.items():
        config = Config(out=str(out / name.replace(" ", "-")), seed=seed, **schedule(options, SIZES[size]))
        _, report = internalize(small_model(task, seed=seed), task, config, resume=True)
        if not result["rows"]:
            result |= {"rows": [line(WHOLE, report["full chain"])], "training": report["training"]}
            result["digits"][WHOLE] = report["full chain"]["digits"]
        result["rows"].append(line(name, report["internalized"]))
        result["digits"][name] = report["internalized"]["digits"]
        if len(report["stages"]) == TOKENS + 1:
            columns = ("removed", "accuracy", "problems_per_second")
            result["stages"][name] = [{key: stage[key] for key in columns} for stage in report["stages"]]
    return result


def line(run: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {"run": run} | {key: figures[key] for key in ("accuracy", "tokens", "problems_per_second", "tokens_per_second")}


def schedule(options: dict[str, Any], size: dict[str, int]) -> dict[str, Any]:
    """As many updates for each run: those not spent on stages are spent on the last one."""
    options = dict(options)
    updates = size["explicit_steps"] + (TOKENS - 1) * size["steps_per_token"] + size["final_steps"]
    explicit = 0 if options.get("remove_all_beyond") == 0 else size["explicit_steps"]
    per_token = max(1, size["steps_per_token"] // options.pop("faster", 1))
    stages = 0 if "remove_all_beyond" in options else TOKENS - 1
    steps = {"explicit_steps": explicit, "steps_per_token": per_token, "final_steps": updates - explicit - stages * per_token}
    return {**size, **steps, **options}


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def accuracy(run: str) -> list[float]:
        return [figure(result, run) for result in results]

    better = [max(pair) for pair in zip(accuracy(KEPT), accuracy(CONTIGUOUS), strict=True)]
    return [
        least("positions kept", accuracy(KEPT), 0.75),
        least("stepwise", accuracy(CONTIGUOUS), 0.55),
        most("no chain ever", accuracy(DIRECT), 0.45),
        most("all at once", accuracy(ABRUPT), 0.20),
        least(
            "the better stepwise run, above no chain ever", [x - y for x, y in zip(better, accuracy(DIRECT), strict=True)], 0.30
        ),
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
            Panel(f"update, {KEPT}", "training loss, nats", losses, marks=marks),
            Panel("digit of the answer, units first", "accuracy on test problems", digits),
            Panel("accuracy on test problems", "", bars=bars),
        ],
    )
    return (
        "Accuracy at the end of each stage, against the tokens removed; accuracy and speed after training; the training "
        "loss, with a line where a token is removed; accuracy of each digit of the answer, and of whole answers. Thin lines "
        "and small dots are seeds, thick lines, large dots and bars their mean"
    )
