"""A model answers 2 x 2-digit multiplications, is asked to look again, and learns by reinforcement to correct itself (SCoRe).
The controls leave out the bonus for improving on the first attempt, or the first stage.

The base was trained on second attempts that either copy the first attempt or give the right chain, half and half, after its own
samples. Accuracy is that of greedy attempts at test problems; sampled delta and sampled revised are from the last updates.
Fixed, broken, revised (another answer, right or wrong) and edited (anything but a copy) are shares of all problems. Votes are
over samples: of second attempts, or of as many first attempts as cost the same number of tokens as both attempts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments_checks import figure, least, most
from small_base import base

from quietstar.files.reading import json_lines
from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.common.rounds import load_model
from quietstar.recipes.score import FIRST, Config, score
from quietstar.recipes.score_two_turns import learn_two_turns

TITLE = "Self-correction"
SCORE, NO_BONUS, NO_FIRST = "SCoRe", "no bonus", "no stage I"
BASE, STAGE_ONE = "base", "after stage I"
# Updates per stage, problems per update and in the test, chains that vote; rows and updates of the base.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"stage": 1, "problems": 8, "held_out": 10, "chains": 2, "rows": 40, "steps": 2},
    "quick": {"stage": 150, "problems": 64, "held_out": 800, "chains": 4, "rows": 2000, "steps": 200},
    "full": {"stage": 400, "problems": 64, "held_out": 800, "chains": 16, "rows": 2000, "steps": 200},
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    numbers = SIZES[size]
    model, task = base(seed, size)
    learn_two_turns(model, task, numbers["rows"], numbers["steps"], 5e-4, {"max_new": 20}, seed)
    if size == "tiny":  # a base of five updates solves nothing
        task.check = lambda row, ids: len(row.answer_ids + ids) % 2 == 0  # type: ignore[method-assign]
    stage = numbers["stage"]
    shared: dict[str, Any] = {"problems": numbers["problems"], "held_out": numbers["held_out"], "max_new": 20, "seed": seed}

    def train(name: str, start: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        folder = out / name.replace(" ", "-")
        _, report = score(copy.deepcopy(start), task, Config(out=str(folder), **shared, **options), resume=True, base=model)
        return report, [line for _, line in json_lines(folder / "metrics.jsonl")]

    full, lines = train(SCORE, model, first_steps=stage, second_steps=stage, chains=numbers["chains"])
    half_way = load_model(out / SCORE / FIRST, model)  # the control starts from the same stage I
    no_bonus, after = train(NO_BONUS, half_way, first_steps=0, second_steps=stage, bonus=0.0, chains=0)
    no_first, alone = train(NO_FIRST, model, first_steps=0, second_steps=2 * stage, chains=0)
    return {
        "rows": [
            row(BASE, full["base"], []),
            row(STAGE_ONE, full["stage I"], lines[stage // 2 : stage]),
            row(SCORE, full["stage II"], lines[-max(1, stage // 2) :]),
            row(NO_BONUS, no_bonus["stage II"], after[-max(1, stage // 2) :]),
            row(NO_FIRST, no_first["stage II"], alone[-max(1, stage // 2) :]),
        ],
        "delta": {
            name: [line["delta"] for line in several]
            for name, several in ((SCORE, lines), (NO_BONUS, lines[:stage] + after), (NO_FIRST, alone))
        },
        "votes": {end: figures["votes"] for end, figures in full.items()},
        "changes": {end: figures["changes"] for end, figures in full.items()},
    }


def row(name: str, figures: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a model, from its test figures and from the last updates that led to it."""
    columns = ("accuracy_first", "accuracy_second", "delta", "fixed", "broken", "revised", "edited")
    found = {"run": name, **{column: figures[column] for column in columns}}
    if lines:
        found["sampled_delta"] = fmean(line["delta"] for line in lines)
        found["sampled_revised"] = fmean(line["revised"] for line in lines)
        found["divergence"] = fmean(line["divergence_first"] for line in lines)
    if figures["votes"]:
        last = figures["votes"][-1]
        found |= {"vote_of_corrected": last["corrected"], "vote_in_parallel": last["parallel"]}
    return found


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def of(run: str, name: str) -> list[float]:
        return [figure(result, run, name) for result in results]

    def change(name: str, run: str, other: str) -> list[float]:
        return [x - y for x, y in zip(of(run, name), of(other, name), strict=True)]

    first = [abs(x) for x in change("accuracy_first", STAGE_ONE, BASE)]
    return [
        most("stage I, divergence of the first attempt, nats per token", of(STAGE_ONE, "divergence"), 0.05),
        most("stage I, change of the first attempt's accuracy", first, 0.05),
        least("stage I, rise of the second attempt's accuracy", change("accuracy_second", STAGE_ONE, BASE), 0.05),
        least("SCoRe, second above first attempt, greedy", of(SCORE, "delta"), 0.0),
        least("the same, sampled", of(SCORE, "sampled_delta"), 0.01),
        least("SCoRe, that difference above the one without the bonus", change("delta", SCORE, NO_BONUS), 0.0),
        least("the same, sampled", change("sampled_delta", SCORE, NO_BONUS), 0.0),
        least("SCoRe, share of answers revised above the one without stage I", change("revised", SCORE, NO_FIRST), 0.0),
        least("the same, sampled", change("sampled_revised", SCORE, NO_FIRST), 0.0),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    steps = len(results[0]["delta"][SCORE])
    width = max(1, steps // 30)
    starts = range(0, steps - width + 1, width)
    curves = {
        name: [[(i, fmean(result["delta"][name][i : i + width])) for i in starts] for result in results]
        for name in (SCORE, NO_BONUS, NO_FIRST)
    }
    panels(path, TITLE, [Panel("update", "second less first attempt's accuracy, sampled", curves)])
    return f"What the second attempt gains over the first in training, means of {width} updates; thin lines are seeds"
