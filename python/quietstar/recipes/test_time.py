"""What more tokens at test time buy: votes, choice by a verifier, and attempts that revise each other, at equal budgets.

Parallel: N solutions of each problem, of which a selector takes one. Sequential: a chain of attempts, each of which sees up to
four before it. A budget is a number of generated tokens a problem, and every method gets as many whole solutions as fit.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quietstar.batches import mix_seed
from quietstar.files import write_whole
from quietstar.intervals import mean_interval
from quietstar.recipes import plots
from quietstar.recipes.models import option
from quietstar.recipes.sampling import Completion, Sampling, likelihoods, rollout
from quietstar.recipes.selectors import ORDERS, Sample, Selector, best, likeliest, majority, orders, pass_at, weighted
from quietstar.recipes.sft import Example, SFTConfig, sft
from quietstar.tasks import Row, Task

SEEN = 4  # attempts that the next one sees, at most; of arXiv 2408.03314
Scorer = Callable[[Sequence[Row], Sequence[list[int]]], list[float]]  # rows and solutions to a verifier's scores


@dataclass
class Config(SFTConfig, Sampling):
    """How much is spent on which problems.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/solve", "folder for samples, figures and the plot")
    problems: int = option(400, "test problems")
    samples: int = option(16, "N, solutions of each problem")
    attempts: int = option(8, "length of a chain of revisions; 0 for none")
    revise_steps: int = option(0, "training steps on revisions of the model's own wrong attempts, before it revises")
    revise_problems: int = option(2000, "training problems for those steps")

    def __post_init__(self) -> None:
        for part in (SFTConfig, Sampling):
            part.__post_init__(self)
        for name in ("problems", "samples", "revise_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"solve: {name} must be 1 or more, got {getattr(self, name)!r}")
        for name in ("attempts", "revise_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"solve: {name} must be 0 or more, got {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise ValueError(f"solve: temperature must be above 0, or all samples are one, got {self.temperature!r}")


def solve(model: PreTrainedModel, task: Task, config: Config, scorer: Scorer | None = None) -> dict[str, Any]:
    """Measure all methods on the same test problems.

    Writes samples.jsonl, test_time.json and, with matplotlib, test_time.png into ``config.out``.

    Args:
        scorer: of a verifier; without one, its methods are left out.

    Returns:
        task, problems, greedy (accuracy, low, high, tokens) and curves: for each method its points, with budget, accuracy, low
        and high, and tokens, the mean of what was used.

    Raises:
        ValueError: no solution has an answer that can be read.
    """
    rows = task.sample(config.problems, "test", torch.Generator().manual_seed(mix_seed(config.seed, 0)))
    parallel = draw(model, task, rows, config, scorer)
    if not any(x.answer is not None for several in parallel for x in several):
        raise ValueError(f"solve: no solution of {len(rows)} problems has an answer that can be read")
    greedy = measure(task, rows, rollout(model, task, [row.prompt_ids for row in rows], temperature=0, max_new=config.max_new))
    right = [float(several[0].right) for several in greedy]
    accuracy, low, high = mean_interval(right)
    unit = sum(x.tokens for several in parallel for x in several) / (len(rows) * config.samples)
    budgets = [2**i * unit for i in range(config.samples.bit_length())]
    curves = {name: curve(parallel, pick, budgets) for name, pick in selectors(scorer is not None).items()}
    curves["oracle"] = oracle(parallel, unit)
    if config.attempts:
        reviser = model
        if config.revise_steps:
            reviser = train_reviser(model, task, config)
        chains = revise(reviser, task, rows, config, scorer)
        curves["sequential, majority"] = curve(chains, majority, budgets, 1)
        curves["sequential, last"] = curve(chains, lambda several: several[-1], budgets, 1)
        if scorer:
            curves["sequential, verifier"] = curve(chains, best, budgets, 1)
    tokens = sum(several[0].tokens for several in greedy) / len(rows)
    report = {"task": task.name, "problems": len(rows), "config": asdict(config)}
    report |= {"greedy": {"accuracy": accuracy, "low": low, "high": high, "tokens": tokens}, "curves": curves}
    save(report, parallel, Path(config.out))
    return report


def selectors(verified: bool) -> dict[str, Selector]:
    """By the name that reports have."""
    plain: dict[str, Selector] = {"one sample": lambda several: several[0], "majority": majority, "likeliest": likeliest}
    return plain | {"best of k": best, "weighted vote": weighted} if verified else plain


def draw(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, scorer: Scorer | None) -> list[list[Sample]]:
    """N samples of each row."""
    prompts = [row.prompt_ids for row in rows]
    written = rollout(model, task, prompts, config.samples, seed=mix_seed(config.seed, 1), **config.sampling)
    return measure(task, rows, written, scorer)


def measure(
    task: Task, rows: Sequence[Row], written: Sequence[Sequence[Completion]], scorer: Scorer | None = None
) -> list[list[Sample]]:
    """What the selectors need to know about each solution."""
    flat = [(row, x) for row, several in zip(rows, written, strict=True) for x in several]
    scores: Sequence[float | None] = [None] * len(flat)
    if scorer:
        scores = scorer([row for row, _ in flat], [task.trimmed(x.ids) for _, x in flat])
    samples = iter(
        Sample(answer := task.answer(row, x.ids), answer == row.problem.right, len(x.ids), sum(x.logprob), score)
        for (row, x), score in zip(flat, scores, strict=True)
    )
    return [[next(samples) for _ in several] for several in written]


def likelihood_scorer(verifier: PreTrainedModel, batch_size: int = 256) -> Scorer:
    """A verifier's log-probability of the whole solution."""
    return lambda rows, solutions: likelihoods(verifier, [row.prompt_ids for row in rows], solutions, batch_size)


def revise(
    model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, scorer: Scorer | None = None
) -> list[list[Sample]]:
    """A chain of attempts at each row."""
    written: list[list[Completion]] = [[] for _ in rows]
    for number in range(config.attempts):
        prompts = [
            revision_prompt(task, row, [task.trimmed(x.ids) for x in before]) for row, before in zip(rows, written, strict=True)
        ]
        seed = mix_seed(config.seed, 2 + number)
        for before, several in zip(written, rollout(model, task, prompts, seed=seed, **config.sampling), strict=True):
            before += several
    return measure(task, rows, written, scorer)


def revision_prompt(task: Task, row: Row, attempts: Sequence[list[int]]) -> list[int]:
    """The prompt, and the last attempts, each with the request for another."""
    return row.prompt_ids + [x for ids in attempts[-SEEN:] for x in ids + task.again_ids]


def train_reviser(model: PreTrainedModel, task: Task, config: Config) -> PreTrainedModel:
    """A copy of the model that learnt to write a right solution behind 0 to 4 wrong ones of its own.

    Raises:
        ValueError: no training problem has a right solution to learn from.
    """
    generator = torch.Generator().manual_seed(mix_seed(config.seed, -1))
    rows = task.sample(config.revise_problems, "train", generator)
    prompts = [row.prompt_ids for row in rows]
    written = rollout(model, task, prompts, 2 * SEEN, seed=mix_seed(config.seed, -2), **config.sampling)
    choose = random.Random(config.seed)
    examples = [x for row, several in zip(rows, written, strict=True) for x in revisions(task, row, several, choose)]
    if not examples:
        raise ValueError(f"solve: none of {len(rows)} training problems has a right solution to learn revising from")
    return sft(copy.deepcopy(model), examples, config.revise_steps, config, config.seed)


def revisions(task: Task, row: Row, written: Sequence[Completion], choose: random.Random) -> list[Example]:
    """An example of a row: wrong attempts, the last the nearest to the right one, then that; none without a right one."""
    solutions = [task.trimmed(x.ids) for x in written]
    right = [ids for ids in solutions if task.check(row, ids)]
    wrong = [ids for ids in solutions if not task.check(row, ids)]
    if not right:
        return []
    target = choose.choice(right)
    shown = choose.sample(wrong, min(choose.randint(0, SEEN), len(wrong)))
    shown.sort(key=lambda ids: SequenceMatcher(None, ids, target, autojunk=False).ratio())
    return [(revision_prompt(task, row, shown), target)]


def curve(
    samples: Sequence[Sequence[Sample]], pick: Selector, budgets: Sequence[float], shuffles: int = ORDERS
) -> list[dict[str, Any]]:
    """Accuracy at each budget, with an interval over problems.

    A problem's samples are taken, one at least, in their own order, and with more ``shuffles`` in random ones too.
    """
    several = [orders(x, shuffles) for x in samples]
    points = []
    for budget in budgets:
        taken = [[affordable(x, budget) for x in ordered] for ordered in several]
        right = [sum(pick(x).right for x in chosen) / len(chosen) for chosen in taken]
        tokens = [sum(y.tokens for x in chosen for y in x) / len(chosen) for chosen in taken]
        accuracy, low, high = mean_interval(right)
        points.append({"budget": budget, "accuracy": accuracy, "low": low, "high": high, "tokens": sum(tokens) / len(tokens)})
    return points


def affordable(samples: Sequence[Sample], budget: float) -> Sequence[Sample]:
    """The first ones that fit into a budget of tokens, but one at least."""
    spent = 0
    for count, x in enumerate(samples):
        spent += x.tokens
        if count and spent > budget:
            return samples[:count]
    return samples


def oracle(samples: Sequence[Sequence[Sample]], unit: float) -> list[dict[str, Any]]:
    """Whether any of k is right, what a perfect verifier would reach; without bias for any k."""
    points = []
    for k in [2**i for i in range(len(samples[0]).bit_length())]:
        accuracy, low, high = mean_interval([pass_at(k, [x.right for x in several]) for several in samples])
        points.append({"budget": k * unit, "accuracy": accuracy, "low": low, "high": high, "tokens": k * unit})
    return points


def save(report: Mapping[str, Any], samples: Sequence[Sequence[Sample]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps([asdict(x) for x in several]) + "\n" for several in samples]
    write_whole(out / "samples.jsonl", "".join(lines))
    write_whole(out / "test_time.json", json.dumps(report, indent=2) + "\n")
    curves = {name: [(point["tokens"], point["accuracy"]) for point in points] for name, points in report["curves"].items()}
    greedy = report["greedy"]["tokens"], report["greedy"]["accuracy"]
    title = f"{report['task']}, {report['problems']} test problems"
    plots.draw(out / "test_time.png", curves, "tokens generated a problem", title, greedy)
