"""Attempts at a problem, two as in SCoRe's training or more in a row; their figures and plots; and votes, to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.evaluation.intervals import paired
from quietstar.run.batches import mix_seed
from quietstar.run.metrics import Line
from quietstar_recipes.common.plots import Panel, Points, panels
from quietstar_recipes.common.sampling import Completion, rollout
from quietstar_recipes.common.selectors import Sample, majority, powers_of_two
from quietstar_recipes.common.solutions import revision_prompt, to_samples
from quietstar_recipes.tasks import Row, Task

POINTS = 30  # of a curve over the updates, roughly


@dataclass(frozen=True)
class Attempts:
    """Two attempts at each of R problems.

    Attributes:
        first: ids of the first attempt.
        requests, second: ids of everything before the second attempt, and of that attempt.
        rewards: [2,R], 1 where an attempt is right.
        logprob: [2,R], the log-probability of each attempt under the model that wrote it.
        own: bool [R], whether the model wrote the first attempt itself, rather than the base model.
        revised: bool [R], whether the second attempt's answer differs from the first's.
    """

    rows: Sequence[Row]
    first: list[list[int]]
    requests: list[list[int]]
    second: list[list[int]]
    rewards: Tensor
    logprob: Tensor
    own: Tensor
    revised: Tensor

    def part(self, indices: Sequence[int]) -> Attempts:
        """The attempts at the problems with these indices."""
        rows = [self.rows[i] for i in indices]
        first, requests, second = ([x[i] for i in indices] for x in (self.first, self.requests, self.second))
        flags = (x[..., indices] for x in (self.rewards, self.logprob, self.own, self.revised))
        return Attempts(rows, first, requests, second, *flags)

    def parts(self, size: int) -> Iterator[Attempts]:
        """All attempts, ``size`` problems at a time."""
        for indices in torch.arange(len(self.first)).split(size):
            yield self.part(indices.tolist())

    def turns(self) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
        """Of the first and of the second attempts: the ids before each, and its own."""
        yield [row.prompt_ids for row in self.rows], self.first
        yield self.requests, self.second

    def tokens(self) -> Tensor:
        """Number of tokens of all first and of all second attempts, [2]."""
        return torch.tensor([sum(map(len, attempts)) for attempts in (self.first, self.second)])

    def figures(self) -> dict[str, float]:
        """Figures of both attempts, over all problems.

        accuracy_first, accuracy_second, and delta, their difference with its 95 % interval (low, high). Shares of the problems:
        fixed (wrong, then right), broken (right, then wrong), revised (another answer, also from wrong to wrong) and edited
        (not a copy; the answer may be the same).
        """
        first, second = (x.bool().tolist() for x in self.rewards)
        compared = paired(second, first)
        n = len(first)
        return {
            "problems": n,
            "accuracy_first": sum(first) / n,
            "accuracy_second": sum(second) / n,
            "delta": compared["difference"],
            "low": compared["low"],
            "high": compared["high"],
            "fixed": compared["first"] / n,
            "broken": compared["second"] / n,
            "revised": int(self.revised.sum()) / n,
            "edited": sum(x != y for x, y in zip(self.first, self.second, strict=True)) / n,
        }


def asked_again(task: Task, rows: Sequence[Row], attempts: Sequence[list[int]]) -> list[list[int]]:
    """The prompts for a second attempt at each row, after this first one."""
    return [revision_prompt(task, row, [task.trimmed(ids)]) for row, ids in zip(rows, attempts, strict=True)]


def attempt(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    sampling: Mapping[str, Any],
    seed: int,
    base: PreTrainedModel | None = None,
    share: float = 0.0,
) -> Attempts:
    """Two attempts at each row, the second of which sees the first; ``base`` writes a ``share`` of the first ones."""
    by_base = torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix_seed(seed, 2)))[: int(share * len(rows))]
    own = torch.ones(len(rows), dtype=torch.bool)
    own[by_base] = False
    written: list[Completion] = [Completion([], [])] * len(rows)
    for number, writer, mask in ((0, model, own), (3, base, ~own)):
        places = mask.nonzero()[:, 0].tolist()
        if writer is not None and places:
            found = rollout(writer, task, [rows[i].prompt_ids for i in places], **sampling, seed=mix_seed(seed, number))
            for i, completions in zip(places, found, strict=True):
                written[i] = completions[0]
    first = [x.ids for x in written]
    requests = asked_again(task, rows, first)
    again = [completions[0] for completions in rollout(model, task, requests, **sampling, seed=mix_seed(seed, 1))]
    second = [x.ids for x in again]
    logprob = torch.tensor([[sum(x.logprob) for x in completions] for completions in (written, again)])
    right = [[task.check(row, ids) for row, ids in zip(rows, attempts, strict=True)] for attempts in (first, second)]
    rewards = torch.tensor(right, dtype=torch.float32)
    revised = torch.tensor([task.answer(row, x) != task.answer(row, y) for row, x, y in zip(rows, first, second, strict=True)])
    return Attempts(rows, first, requests, second, rewards, logprob, own, revised)


def accuracy_by_attempt(
    model: PreTrainedModel, task: Task, attempts: Attempts, count: int, sampling: Mapping[str, Any], seed: int
) -> list[float]:
    """The accuracy of each of ``count`` attempts in a row. As in training, an attempt sees the one before it and no others.

    Args:
        attempts: the first two.
    """
    found, latest = attempts.rewards.mean(1).tolist(), attempts.second
    for number in range(2, count):
        requests = asked_again(task, attempts.rows, latest)
        latest = [x.ids for (x,) in rollout(model, task, requests, **sampling, seed=mix_seed(seed, number + 2))]
        found.append(fmean(map(task.check, attempts.rows, latest)))
    return found


def votes(
    model: PreTrainedModel, task: Task, rows: Sequence[Row], chains: int, sampling: Mapping[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Compare corrections with parallel solutions, by the majority vote of each, for 1 to ``chains`` chains of two attempts.

    The vote of the second attempts is compared with that of independent first attempts, as many as it takes to spend, problem
    by problem, at least the tokens of both attempts. Tokens that are only read do not count.

    Returns:
        One point per power of 2, none for no chains: chains; corrected and parallel, which are accuracies; their difference
        with its 95 % interval, low and high; and the tokens generated per problem, tokens and tokens_parallel.
    """
    if not chains:
        return []
    prompts = [row.prompt_ids for row in rows]
    first = rollout(model, task, prompts, 2 * chains, **sampling, seed=mix_seed(seed, 0))
    requests = asked_again(
        task, [row for row in rows for _ in range(chains)], [x.ids for several in first for x in several[:chains]]
    )
    flat = rollout(model, task, requests, **sampling, seed=mix_seed(seed, 1))
    second: list[list[Completion]] = [[x for (x,) in flat[i : i + chains]] for i in range(0, len(flat), chains)]
    parallel = to_samples(task, rows, first)
    corrected = [
        [replace(y, tokens=x.tokens + y.tokens) for x, y in zip(before, after, strict=False)]
        for before, after in zip(parallel, to_samples(task, rows, second), strict=True)
    ]
    points = []
    for k in powers_of_two(chains):
        bought = [samples[:k] for samples in corrected]
        instead = [reaching(x, tokens(y)) for x, y in zip(parallel, bought, strict=True)]
        right = [[majority(x).right for x in samples] for samples in (bought, instead)]
        compared = paired(*right)
        points.append(
            {
                "chains": k,
                "corrected": fmean(right[0]),
                "parallel": fmean(right[1]),
                **{name: compared[name] for name in ("difference", "low", "high")},
                "tokens": fmean(map(tokens, bought)),
                "tokens_parallel": fmean(map(tokens, instead)),
            }
        )
    return points


def tokens(samples: Sequence[Sample]) -> int:
    """Number of tokens of all samples."""
    return sum(x.tokens for x in samples)


def reaching(samples: Sequence[Sample], budget: int) -> Sequence[Sample]:
    """The first samples that together have at least ``budget`` tokens; all of them if they have fewer."""
    count = next((n for n in range(1, len(samples)) if tokens(samples[:n]) >= budget), len(samples))
    return samples[:count]


class Update(Line):
    """What ``plot`` shows of a line of metrics."""

    stage: int
    accuracy_first: float
    accuracy_second: float
    divergence_first: float
    divergence_second: float


def plot(path: Path, report: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Plot a run's report and its metrics, a line per update; does nothing without matplotlib."""

    def over(*names: str) -> dict[str, list[Points]]:
        """Means of both attempts' figures over a few updates at a time."""
        width = max(1, len(lines) // POINTS)
        parts = [lines[i : i + width] for i in range(0, len(lines), width)]
        return {
            label: [[(part[-1]["step"], fmean(line[name] for line in part)) for part in parts]]
            for label, name in zip(("first attempt", "second attempt"), names, strict=True)
        }

    bought: dict[str, list[Points]] = {}
    for end, figures in report.items():
        for name, spent in (("corrected", "tokens"), ("parallel", "tokens_parallel")):
            if figures["votes"]:
                bought[f"{end}, {name}"] = [[(x[spent], x[name]) for x in figures["votes"]]]
    in_a_row = {end: [list(enumerate(figures["accuracy_by_attempt"], 1))] for end, figures in report.items()}
    ends = [b["step"] - 1 for a, b in zip(lines, lines[1:], strict=False) if a["stage"] != b["stage"]]
    plots = [
        Panel("update", "reward of an attempt", over("accuracy_first", "accuracy_second"), marks=ends),
        Panel("update", "divergence from the base, nats per token", over("divergence_first", "divergence_second"), marks=ends),
        Panel("attempt", "accuracy on test problems", in_a_row),
        Panel("tokens generated per problem", "accuracy of the majority vote", bought),
    ]
    panels(path, title, [panel for panel in plots if panel.curves])
