"""The report of a Fast Quiet-STaR run: the cost of thoughts of each length, where thoughts help, and plots of both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar import QuietStar
from quietstar.evaluation.losses import token_losses
from quietstar.recipes import fast_plain as plain
from quietstar.recipes.common.plots import Panel, panels
from quietstar.run.batches import Example

TEXTS, NEW, TURNS = 4, 16, 3  # of the speed measurement: texts continued at once, most new tokens of each, and repetitions


def speeds(qs: QuietStar, texts: Sequence[Example], lengths: Sequence[int]) -> list[dict[str, float]]:
    """Seconds per generated token with thoughts of each of these lengths, and without thoughts (0).

    All lengths continue the same texts in turn, with the same weights, so only the length affects the speed. The figure to look
    at is times_plain, the ratio to the time without thoughts, a median over the turns.
    """
    some = [texts[i] for i in range(min(TEXTS, len(texts)))]
    kept = [x["input_ids"][: int(x["attention_mask"].sum()) if "attention_mask" in x else None] for x in some]
    shortest = min(map(len, kept))
    ids = torch.stack([x[: shortest // 2] for x in kept]).to(qs.start_embedding.device)
    new = min(NEW, shortest - shortest // 2)  # no longer than the texts, which fit together with their thoughts
    trained_with = qs.thought_config
    seconds: dict[int, list[float]] = {T: [] for T in [*lengths, 0]}
    for turn in range(TURNS + 1):
        for T, found in seconds.items():
            qs.use_config(replace(trained_with, thought_tokens=T or 1))
            took = _generate(qs, ids, new, "always" if T else "never") / (len(ids) * new)
            if turn:  # the first turn warms up
                found.append(took)
    qs.use_config(trained_with)
    ratios = {T: [a / b for a, b in zip(found, seconds[0], strict=True)] for T, found in seconds.items()}
    return [
        {"thought_tokens": T, "seconds_per_token": median(found), "times_plain": median(ratios[T])}
        for T, found in seconds.items()
    ]


def _generate(qs: QuietStar, ids: Tensor, new: int, think: str) -> float:
    """Seconds that the generation takes."""
    began = time.perf_counter()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    qs.generate(ids, torch.ones_like(ids), max_new_tokens=new, think=think, **options).tolist()
    return time.perf_counter() - began


def by_position(
    before: PreTrainedModel, student: PreTrainedModel, teacher: QuietStar, texts: Sequence[Example], config: plain.Config
) -> list[dict[str, float]]:
    """Means over texts at each position: what a thought there gains, and the reward of the plain model's tokens.

    Returns:
        position; texts, how many have that position; gain of the teacher's greedy thought, nats; reward_before and
        reward_after, of the plain model before and after its training.
    """
    found = token_losses(teacher.eval(), texts, config.batch_size, controls=False)
    columns = {"gain": found.base - found.mixed}
    for name, model in (("reward_before", before), ("reward_after", student)):
        columns[name] = plain.reward(found.mixed, plain.token_nll(model, texts, config.batch_size)[0], config)
    counts = found.place.bincount()
    sums = {name: found.place.bincount(values) for name, values in columns.items()}
    return [
        {"position": position, "texts": int(counts[position])}
        | {name: float(x[position] / counts[position]) for name, x in sums.items()}
        for position in counts.nonzero()[:, 0].tolist()
    ]


def plot(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Plot a report of ``fast.fast``; does nothing without matplotlib."""
    times = {x["thought_tokens"]: x["times_plain"] for x in report["speeds"]}
    stages = [(stage["thought_tokens"], stage["mixed"]) for stage in report["stages"]]
    without = {name: report[name] for name in ("base", "plain")}
    cost = {"curriculum": [[(times[T], loss) for T, loss in stages]]}
    tokens = {"curriculum": [stages]}
    by_name = {
        name.replace("_", " "): [[(x["position"], x[name]) for x in report["positions"]]]
        for name in ("gain", "reward_before", "reward_after")  # of the last stage's thought; of the plain model
    }
    panels(
        path,
        title,
        [
            Panel("seconds per token, relative to no thoughts", "held-out loss, nats", cost | points_at(times[0], without)),
            Panel("tokens per thought", "held-out loss, nats", tokens | points_at(0, without)),
            Panel("position", "gain, reward; nats", by_name),
        ],
    )


def points_at(x: float, values: Mapping[str, float]) -> dict[str, list[list[tuple[float, float]]]]:
    """A point at x for each name."""
    return {name: [[(x, y)]] for name, y in values.items()}
