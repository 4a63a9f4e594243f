"""A model answers 2 x 2-digit multiplications, is asked to look again, and learns by reinforcement to correct itself (SCoRe).

Its base takes no notice of its first attempt: it was trained on pairs of independent samples of its own, so it breaks more
right answers than it fixes wrong ones. Four controls each leave out a step: the bonus for improving on the first attempt, stage
I, the second turn (reinforcement of first attempts alone), and first attempts of the model's own in stage II (they are the
base's). Two learn from the base's samples by supervision: Pair-SFT from a wrong and a right attempt at one problem, STaR from
the second attempts that fixed the first. All have as many updates, and those by reinforcement as many attempts; the supervised
ones learn from 8,000 attempts or pairs of attempts.

Accuracy is that of greedy attempts at test problems; sampled delta and sampled revised are from the last updates. Fixed,
broken, revised (another answer, right or wrong) and edited (anything but a copy) are shares of all problems. Divergence is that
of the first attempt, nats per token. Votes are over samples: of second attempts, or of as many first attempts as cost the same
number of tokens as both attempts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiments_checks import figure, gaps, least, most
from small_base import base

from quietstar.files.reading import json_lines
from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.common.rounds import load_model
from quietstar.recipes.common.sft import SFTConfig, sft
from quietstar.recipes.score import FIRST, Config, evaluate, score
from quietstar.recipes.score_baselines import corrected, paired
from quietstar.recipes.score_two_turns import learn_two_turns

TITLE = "Self-correction"
BASE, STAGE_ONE, SCORE = "base", "after stage I", "SCoRe"
NO_BONUS, NO_FIRST, SINGLE, OFFLINE = "no bonus", "no stage I", "single-turn RL", "the base's first attempts"
PAIRS, STAR = "Pair-SFT", "STaR on second attempts"
CONTROLS = (PAIRS, STAR, SINGLE, NO_FIRST, NO_BONUS)
# Updates of stage I and II, problems per update and in the test, chains that vote; problems and updates that the base learns
# second attempts from, and problems that the supervised controls attempt.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"first": 1, "second": 1, "problems": 4, "held_out": 10, "chains": 2, "rows": 40, "steps": 2, "attempted": 40},
    "quick": {"first": 120, "second": 40, "problems": 32, "held_out": 800, "chains": 4, "rows": 2000, "steps": 200},
    "full": {"first": 400, "second": 150, "problems": 32, "held_out": 800, "chains": 16, "rows": 2000, "steps": 200},
}
ATTEMPTED, SAMPLES, MAX_NEW = 2000, 4, 20
RATE = 3e-4
LAST = 20  # updates, whose samples are averaged


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    numbers = SIZES[size]
    first, second = numbers["first"], numbers["second"]
    model, task = base(seed, size)
    learn_two_turns(model, task, numbers["rows"], numbers["steps"], 5e-4, {"max_new": MAX_NEW}, seed)
    if size == "tiny":  # a base of five updates solves nothing
        task.check = lambda row, ids: len(row.answer_ids + ids) % 2 == 0  # type: ignore[method-assign]
    shared: dict[str, Any] = {
        "problems": numbers["problems"],
        "samples": SAMPLES,
        "held_out": numbers["held_out"],
        "max_new": MAX_NEW,
        "learning_rate": RATE,
        "save_every": 20,
        "seed": seed,
    }

    def train(name: str, start: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        folder = out / name.replace(" ", "-").replace("'", "")
        config = Config(out=str(folder), **{"chains": 0, **shared, **options})
        _, report = score(copy.deepcopy(start), task, config, resume=True, base=model)
        return report, [line for _, line in json_lines(folder / "metrics.jsonl")]

    def supervised(examples_of: Callable[..., Any]) -> dict[str, Any]:
        problems = task.sample(numbers.get("attempted", ATTEMPTED), "train", torch.Generator().manual_seed(seed))
        examples = examples_of(model, task, problems, SAMPLES, {"max_new": MAX_NEW}, seed)
        trained = sft(copy.deepcopy(model), examples, first + second, SFTConfig(learning_rate=RATE), seed)
        test = task.sample(numbers["held_out"], "test", torch.Generator().manual_seed(seed))
        return evaluate(trained, model, task, test, Config(chains=0, **shared))

    full, lines = train(SCORE, model, first_steps=first, second_steps=second, chains=numbers["chains"])
    half_way = load_model(out / SCORE / FIRST, model)  # the controls of stage II start from the same stage I
    later = {
        NO_BONUS: train(NO_BONUS, half_way, first_steps=0, second_steps=second, bonus=0.0),
        OFFLINE: train(OFFLINE, half_way, first_steps=0, second_steps=second, from_base=1.0),
        NO_FIRST: train(NO_FIRST, model, first_steps=0, second_steps=first + second),
        SINGLE: train(SINGLE, model, first_steps=0, second_steps=first + second, single_turn=True),
    }
    rows = [
        row(BASE, full["base"]),
        row(STAGE_ONE, full["stage I"], lines[:first]),
        row(SCORE, full["stage II"], lines),
        *(row(name, report["stage II"], after) for name, (report, after) in later.items()),
        row(PAIRS, supervised(paired)),
        row(STAR, supervised(corrected)),
    ]
    for found in rows:
        found["rise"] = found["delta"] - rows[0]["delta"]
    return {
        "rows": rows,
        "delta": {
            SCORE: [line["delta"] for line in lines],
            NO_BONUS: [line["delta"] for line in [*lines[:first], *later[NO_BONUS][1]]],
            **{name: [line["delta"] for line in later[name][1]] for name in (NO_FIRST, SINGLE)},
        },
        "by_attempt": {
            **{name: full[end]["accuracy_by_attempt"] for name, end in ((BASE, "base"), (SCORE, "stage II"))},
            **{name: later[name][0]["stage II"]["accuracy_by_attempt"] for name in (NO_FIRST, SINGLE)},
        },
        "votes": {end: figures["votes"] for end, figures in full.items()},
        "changes": {end: figures["changes"] for end, figures in full.items()},
    }


def row(name: str, figures: dict[str, Any], lines: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The row of a model, from its test figures and from the last updates that led to it."""
    columns = ("accuracy_first", "accuracy_second", "delta", "fixed", "broken", "revised", "edited")
    found = {"run": name, **{column: figures[column] for column in columns}}
    last = lines[-LAST:]
    if last:
        found["sampled_delta"] = fmean(line["delta"] for line in last)
        found["sampled_revised"] = fmean(line["revised"] for line in last)
    found["divergence"] = figures["divergence_first"]
    if figures["votes"]:
        found |= {"vote_of_corrected": figures["votes"][-1]["corrected"], "vote_in_parallel": figures["votes"][-1]["parallel"]}
    return found


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def change(name: str, run: str, other: str) -> list[float]:
        return [figure(result, run, name) - figure(result, other, name) for result in results]

    claim = "Reinforced over two turns, a model that lost by being asked again gains by it."
    return [
        most("base, second above first attempt", [figure(result, BASE, "delta") for result in results], 0.0),
        *gaps(claim, results, SCORE, [BASE], 0.02, "delta"),
        *gaps("Every step counts: that gain is larger than without it.", results, SCORE, CONTROLS, 0.0, "delta"),
        *gaps("Fewer right answers are broken.", results, SCORE, [BASE], 0.01, "broken", less=True),
        most("stage I, divergence of the first attempt", [figure(result, STAGE_ONE, "divergence") for result in results], 0.05),
        least("stage I, rise of the second attempt's accuracy", change("accuracy_second", STAGE_ONE, BASE), 0.05),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    steps = len(results[0]["delta"][SCORE])
    width = max(1, steps // 16)
    starts = range(0, steps - width + 1, width)
    curves = {
        name: [[(i, fmean(result["delta"][name][i : i + width])) for i in starts] for result in results]
        for name in results[0]["delta"]
    }
    in_a_row = {
        name: [list(enumerate(result["by_attempt"][name], 1)) for result in results] for name in results[0]["by_attempt"]
    }
    panels(
        path,
        TITLE,
        [
            Panel("update", "second less first attempt's accuracy, sampled", curves),
            Panel("attempt", "accuracy on test problems", in_a_row),
        ],
    )
    return f"What the second attempt gains over the first in training, means of {width} updates; attempts in a row after it"
