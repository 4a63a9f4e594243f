"""The report of a run that internalises chains: accuracy, also of each digit, speed, and their plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from quietstar.files.reading import as_type
from quietstar.recipes.common.evaluation import grade
from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.common.progress import Count
from quietstar.recipes.common.sampling import Completion
from quietstar.recipes.tasks import Row, Task


class Figures(msgspec.Struct):
    """What ``figures`` returns and a plot shows."""

    accuracy: float
    digits: list[float]
    tokens: float
    problems_per_second: float
    tokens_per_second: float


class StageFigures(Figures, kw_only=True):
    removed: Count
    steps: Count


class Line(msgspec.Struct):
    """What ``losses`` reads in a line of metrics."""

    step: Count
    removed: Count
    loss: float
    first_token_loss: float


POINTS = 200  # of the curve of the training loss, roughly


def figures(task: Task, rows: Sequence[Row], written: Sequence[Completion], seconds: float) -> dict[str, Any]:
    """Accuracy and speed of these answers.

    Without chain_right: a chain of which only the end is written can't be checked.
    """
    graded = grade(task, rows, written)
    del graded["chain_right"]
    tokens = sum(len(one.ids) for one in written)
    speeds = {"problems_per_second": len(rows) / seconds, "tokens_per_second": tokens / seconds}
    return {**graded, "digits": digits(task, rows, written), "tokens": tokens / len(rows), **speeds}


def digits(task: Task, rows: Sequence[Row], written: Sequence[Completion]) -> list[float]:
    """The accuracy of each digit of the answers, in the order in which they are written.

    A digit's accuracy is over the problems whose answer is long enough to have it.
    """
    right: list[list[bool]] = []
    for row, one in zip(rows, written, strict=True):
        answer = task.answer(row, one.ids) or ""
        for i, digit in enumerate(row.problem.right):
            if i == len(right):
                right.append([])
            right[i].append(answer[i : i + 1] == digit)
    return [fmean(found) for found in right]


def losses(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The training loss of a run's metrics, averaged over a few updates at a time, never across stages.

    "step" is the last of these updates.
    """
    width = max(1, math.ceil(len(lines) / POINTS))
    known = as_type(list[Line], lines, "metrics.jsonl")
    parts = [list(some) for _, some in groupby(known, lambda line: (line.removed, (line.step - 1) // width))]
    return [
        {name: getattr(some[-1], name) for name in ("step", "removed")}
        | {name: fmean(getattr(line, name) for line in some) for name in ("loss", "first_token_loss")}
        for some in parts
    ]


def plot(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Plot a report of ``internalize.internalize``; does nothing without matplotlib."""
    stages, training = report["stages"], report["training"]
    last = {name: report[name] for name in ("full chain", "internalized", "no chain") if name in report}
    speed = {"each stage": [[(x["problems_per_second"], x["accuracy"]) for x in stages]]}
    speed |= {f"{name}, test": [[(x["problems_per_second"], x["accuracy"])]] for name, x in last.items()}
    removals = [a["step"] for a, b in zip(training, training[1:], strict=False) if a["removed"] != b["removed"]]
    panels(
        path,
        title,
        [
            Panel("tokens removed", "accuracy", {"held-out problems": [[(x["removed"], x["accuracy"]) for x in stages]]}),
            Panel("problems per second", "accuracy", speed),
            Panel(
                "update; lines where a token is removed",
                "training loss, nats",
                {name.replace("_", " "): [[(x["step"], x[name]) for x in training]] for name in ("first_token_loss", "loss")},
                marks=removals,
            ),
            Panel(
                "digit of the answer, in the order written",
                "accuracy on test problems",
                {name: [list(enumerate(x["digits"], 1))] for name, x in last.items()},
            ),
        ],
    )


def plot_distillation(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Plot a report of ``internalize_kd.distill``; does nothing without matplotlib."""
    measured = {name: x for name, x in report.items() if name != "emulation"}
    panels(
        path,
        title,
        [
            Panel("layer", "squared error of the normalised state", {"emulator": [list(enumerate(report["emulation"]))]}),
            Panel("accuracy on test problems", "", bars={name: [x["accuracy"]] for name, x in measured.items()}),
            Panel("problems per second", "", bars={name: [x["problems_per_second"]] for name, x in measured.items()}),
        ],
    )
