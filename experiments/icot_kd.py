"""ICoT-KD, the baseline of stepwise internalisation, replaces the words of the chain with hidden states. First, a student that
is shown a teacher's states learns to answer from the prompt. Then an emulator has to predict these states from the prompt
alone. This baseline may fail.

The task is 2 x 2-digit multiplication with ten narrow layers. There is one state per layer, and so one for each token of the
chain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments_checks import figure, least

from quietstar.files.reading import json_lines
from quietstar.recipes import internalize as icot
from quietstar.recipes import internalize_kd as icot_kd
from quietstar.recipes.common.models import small_model
from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.tasks import Multiplication

TITLE = "Distilled chain of thought"
DIRECT, EARLY = "no chain ever, as many updates", "no chain ever, as many as the student"
LAYERS, WIDTH = 10, 64
SIZES: dict[str, tuple[tuple[int, int, int, int], int, int]] = {  # updates of teacher, student, emulator, both; rows, problems
    "tiny": ((2, 2, 2, 2), 50, 10),
    "quick": ((1200, 1600, 400, 400), 20_000, 400),
    "full": ((1500, 3000, 2000, 3000), 20_000, 800),
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    task = Multiplication(2)
    (teacher, student, *both), rows, problems = SIZES[size]
    shared: dict[str, Any] = {"rows": rows, "held_out": problems, "seed": seed, "eval_every": student}
    model = small_model(task, LAYERS, WIDTH, seed=seed)
    config = icot.Config(out=str(out / "kd"), explicit_steps=teacher, **shared)
    _, report = icot_kd.distill(model, task, config, icot_kd.Config(student, *both), resume=True)
    columns = ("accuracy", "tokens", "problems_per_second")
    names = ("full chain", "shown states", "emulated states", "internalized")
    result = [{"run": name, **{key: report[name][key] for key in columns}} for name in names]

    steps = teacher + student + sum(both)
    direct = icot.Config(out=str(out / "direct"), explicit_steps=0, remove_all_beyond=0, final_steps=steps, **shared)
    _, alone = icot.internalize(model, task, direct, resume=True)
    result.append({"run": DIRECT, **{key: alone["internalized"][key] for key in columns}})
    lines = (line for _, line in json_lines(out / "direct" / "metrics.jsonl"))
    result.append({"run": EARLY, "accuracy": next(line["accuracy"] for line in lines if line["step"] == student)})
    return {"rows": result, "emulation": report["emulation"]}


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def above(run: str, other: str) -> list[float]:
        return [figure(result, run) - figure(result, other) for result in results]

    return [
        least("the teacher, with its chain", [figure(result, "full chain") for result in results], 0.95),
        least("shown the states, above no chain in as many updates", above("shown states", EARLY), 0.30),
        least("internalized, above no chain in as many updates", above("internalized", DIRECT), 0.0),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def bars(column: str) -> dict[str, list[float]]:
        runs = [row["run"] for row in results[0]["rows"] if column in row]
        return {run: [figure(result, run, column) for result in results] for run in runs}

    errors = {"emulator": [list(enumerate(result["emulation"])) for result in results]}
    panels(
        path,
        TITLE,
        [
            Panel("layer", "squared error of a normalised state", errors),
            Panel("accuracy on test problems", "", bars=bars("accuracy")),
            Panel("problems a second", "", bars=bars("problems_per_second")),
        ],
    )
    return (
        "Distance of the emulator's states from the teacher's, where 1 is the error of predicting nothing; accuracy after "
        "each phase and of the controls; and speed. Thin lines and dots are seeds"
    )
