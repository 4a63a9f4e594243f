"""How well a run answers on held-out lines, with one thought per position, and where and what it thinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from quietstar import QuietStar
from quietstar.evaluation.intervals import mean_gains
from sums.quiet_star import own_thoughts, predict
from sums.runs import EVERYWHERE, Run
from sums.task import AT_EQUALS, PAUSE, STEPS, as_text, direct_lines, right_thoughts, running_sums, score


def given_thoughts(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Thoughts that no model wrote: "pause" tokens or "random" digits."""
    if kind == "pause":
        return torch.full(shape, PAUSE)
    return torch.randint(10, shape, generator=generator)


def thoughts_of(qs: QuietStar, run: Run, digits: Tensor, seed: int | None) -> Tensor:
    """Thoughts at "=" of the run's kind [lines,1,1,4]; its own are greedy without a seed."""
    if run.thoughts == "own":
        return own_thoughts(qs, digits, seed=seed)
    return given_thoughts(run.thoughts, (len(digits), 1, 1, STEPS), torch.Generator().manual_seed(seed or 0))


def curve_point(qs: QuietStar, run: Run, digits: Tensor, seed: int) -> dict[str, float]:
    """A point of the learning curve: the shares of exact matches and of right thoughts, greedy if they are its own."""
    thoughts = thoughts_of(qs, run, digits, None)
    result = score(predict(qs, digits, thoughts).mixed, digits)
    return {"exact_match": result["right"] / result["lines"], "right_thoughts": right_thoughts(thoughts, digits)}


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
        row["right_thoughts"] = right_thoughts(thoughts["sampled"], digits)
        row["distinct_thoughts"] = len(thoughts["greedy"].flatten(1).unique(dim=0))
    return row


def measure_gain(qs: QuietStar, digits: Tensor) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Scores with another line's greedy thoughts at "=", and the gain of the own ones in its two parts, nats."""
    own = own_thoughts(qs, digits)
    with_own, with_another = predict(qs, digits, own), predict(qs, digits, own.roll(1, 0))
    answers = running_sums(digits)[:, -1]
    ways = (with_own.base, with_own.mixed, with_another.mixed)
    losses = (nll_loss(x[:, 0], answers, reduction="none").double() for x in ways)
    return score(with_another.mixed, digits), mean_gains(*losses)


def measure_positions(qs: QuietStar, digits: Tensor, seed: int) -> dict[str, list[float]]:
    """Mean mixing weight and mean gain (nats) at each position of a line, with sampled thoughts."""
    weights, gains = [], []
    for some in digits.split(512):
        prediction = predict(qs, some, own_thoughts(qs, some, EVERYWHERE.anchors, seed), EVERYWHERE.anchors)
        following = direct_lines(some)[:, 1:]
        base, mixed = (nll_loss(x.transpose(1, 2), following, reduction="none") for x in (prediction.base, prediction.mixed))
        weights.append(prediction.weight)
        gains.append(base - mixed)
    return {"w": torch.cat(weights).mean(0).tolist(), "gain": torch.cat(gains).mean(0).tolist()}


def some_thoughts(before: QuietStar, after: QuietStar, digits: Tensor, seed: int) -> list[dict[str, Any]]:
    """Sampled thoughts at "=" of a few lines, before and after training, as text."""
    first, last = (own_thoughts(qs, digits, seed=seed)[:, 0, 0] for qs in (before, after))
    prediction = predict(after, digits, last[:, None, None])
    base, mixed = (x[:, 0].softmax(-1) for x in (prediction.base, prediction.mixed))
    sums = running_sums(digits)
    return [
        {
            "line": as_text(direct_lines(digits)[i, : AT_EQUALS + 1]),
            "before": as_text(first[i]),
            "after": as_text(last[i]),
            "right": as_text(sums[i]),
            "answer": as_text(answer),
            "p_without": base[i, answer].item(),
            "p_with": mixed[i, answer].item(),
            "w": prediction.weight[i, 0].item(),
        }
        for i, answer in enumerate(sums[:, -1:])
    ]
