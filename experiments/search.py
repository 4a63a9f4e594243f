"""What do more tokens at test time buy, and how are they best spent (arXiv 2408.03314)? A model that is half trained on 3 x
3-digit multiplication, whose solutions have five steps, solves a problem with as many tokens as 1 to 16 solutions have.

In parallel: it draws solutions, and a vote or a verifier chooses one. The process verifier has learnt the value of each step,
the share of rollouts from there that end right. The outcome verifier has learnt from the same solutions, for as many updates,
whether the whole is right; and the control "without rollouts" has learnt that after every step. Step by step: the process
verifier leads beam search and look-ahead search, whose tokens ahead are counted; a control goes by likelihood alone. In
sequence: attempts revise each other, after training on trajectories of wrong attempts and a right one, and a verifier that
sees the earlier attempts chooses. A model with three times the weights, which has learnt from the same examples, answers with
as many FLOPs.

A problem is easy or hard by the share of right answers among other samples of it: difficulties 1 and 2 of 5, or 3 to 5.
Accuracies are those with the tokens of 16 solutions, "four" those with the tokens of four, and "best" those of the solution
that a verifier ranks first.

A vote that the process verifier weighs is better than a majority. It also ranks solutions better than the outcome verifier,
but by so little that the two choose equally well. Beam search gains on easy problems, where the paper has it on hard ones:
here almost no sample of those is right, so there are few steps to prefer. Most of that gain is there with likelihood alone.
Revisions gain nothing. In training only wrong attempts come before another one, and the model departs from right ones, too:
the last of a chain of 16 is almost never right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiments_checks import figure, gaps, least
from small_base import relative_model
from transformers import PreTrainedModel

from quietstar.files.reading import read_json
from quietstar.run.batches import mix_seed
from quietstar_recipes.common.evaluation import evaluate
from quietstar_recipes.common.logprobs import likelihoods
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.saving import REPORT, load_model, save_model
from quietstar_recipes.common.selectors import auc, best, score, weighted
from quietstar_recipes.common.solutions import to_samples
from quietstar_recipes.common.training import SFTConfig, sft
from quietstar_recipes.solve import run as test_time
from quietstar_recipes.solve.budgets import alone, curve, from_all, measure
from quietstar_recipes.solve.run import BEAM, BEST, LOOKAHEAD, WEIGHTED, write
from quietstar_recipes.solve.search import search
from quietstar_recipes.solve.values import Valued, outcomes, roll_out, train_values, value_scorer
from quietstar_recipes.tasks import Multiplication, Row, Task

TITLE = "Test-time compute"
LIKELIHOOD = "beam search by likelihood"
OUTCOME, NO_ROLLOUTS = "weighted vote, outcome verifier", "weighted vote, without rollouts"
CHAINS = ("sequential, verifier", "sequential, majority", "sequential, last")
EASY, HARD = (1, 2), (3, 4, 5)
FOUR, ALL = 2, -1  # places of the budgets of 4 solutions and of all
# Digits of both factors; rows and updates of the base, in pieces until it solves ENOUGH of the validation problems.
BASE: dict[str, dict[str, int]] = {
    "tiny": {"digits": 2, "rows": 100, "start": 3, "pieces": 0},
    "quick": {"digits": 3, "rows": 8000, "start": 250, "pieces": 40},
    "full": {"digits": 3, "rows": 8000, "start": 250, "pieces": 40},
}
ENOUGH, PIECE = 0.3, 10
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "max_new": 14,
        "samples": 4,
        "problems": 10,
        "valid_problems": 5,
        "process_problems": 20,
        "process_samples": 1,
        "rollouts": 1,
        "process_steps": 1,
        "revise_problems": 20,
        "revise_samples": 2,
        "revise_steps": 1,
        "judge_steps": 1,
    },
    "quick": {
        "max_new": 33,
        "samples": 16,
        "problems": 200,
        "valid_problems": 60,
        "process_problems": 3000,
        "process_samples": 1,
        "rollouts": 2,
        "process_steps": 150,
        "revise_problems": 1000,
        "revise_samples": 8,
        "revise_steps": 200,
        "judge_steps": 100,
    },
    "full": {
        "max_new": 33,
        "samples": 16,
        "problems": 1000,
        "valid_problems": 500,
        "process_problems": 20000,
        "process_samples": 2,
        "rollouts": 4,
        "process_steps": 1500,
        "revise_problems": 2000,
        "revise_samples": 64,
        "revise_steps": 600,
        "judge_steps": 600,
    },
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    task = Multiplication(BASE[size]["digits"])
    options: dict[str, Any] = {"learning_rate": 5e-4, "batch_tokens": 2600, "seed": seed}
    config = test_time.Config(out=str(out / "solve"), attempts=8, **options, **SIZES[size])
    model, larger = base(task, seed, size, out)
    if size == "tiny":  # a base of a few updates solves nothing
        task.answer = lambda row, ids: row.problem.right if sum(ids) % 3 else "0"  # type: ignore[method-assign]
    verifiers = learn_values(model, task, config, out)
    report = test_time.solve(model, task, config, process=verifiers[WEIGHTED], larger=(larger, task))
    result = {name: report[name] for name in ("curves", "by_difficulty", "chosen", "greedy", "larger")}

    test = task.sample(config.problems, "test", torch.Generator().manual_seed(mix_seed(seed, 0)))  # those of ``solve``
    written = write(model, task, test, config)
    budgets = [point["budget"] for point in report["curves"]["majority"]]
    judged = {}
    for name, verifier in verifiers.items():
        samples = to_samples(task, test, written, value_scorer(verifier, task))
        ranked = auc(*([[f(x) for x in several] for several in samples] for f in (score, lambda x: x.right)))
        judged[name] = {"auc": ranked, "best": fmean(best(several).right for several in samples)}
        result["curves"][name] = curve(measure([alone(x) for x in samples], from_all(weighted), budgets), budgets)
    result["rows"] = [
        {
            "run": name,
            "accuracy": points[ALL]["accuracy"],
            "four": points[FOUR]["accuracy"],
            **by_half(report["by_difficulty"], name),
            "tokens": points[ALL]["tokens"],
            **judged.get(name, {}),
        }
        for name, points in result["curves"].items()
    ]
    result["rows"].append({"run": LIKELIHOOD, **by_likelihood(model, task, test, config)})
    for name, figures in (("greedy", report["greedy"]), ("larger model, greedy", report["larger"]["greedy"])):
        result["rows"].append({"run": name, "accuracy": figures["accuracy"], "tokens": figures["tokens"]})
    return result


def by_likelihood(model: PreTrainedModel, task: Task, rows: list[Row], config: test_time.Config) -> dict[str, float]:
    """Beam search without a verifier, with the budgets of four solutions and of all: log-likelihoods are the values."""
    found = {}
    for name, N in (("four", 4), ("accuracy", config.samples)):
        value = partial(likelihoods, model)
        found[name] = fmean(weighted(x.samples).right for x in search(model, task, rows, value, N, config.beam_width, config))
    return found


def base(task: Task, seed: int, size: str, out: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that solves a part of the problems, and one with three times its weights after as many updates."""
    numbers = BASE[size]
    generator = torch.Generator().manual_seed(mix_seed(seed, 1000))
    examples = [(row.prompt_ids, task.completion_ids(row)) for row in task.sample(numbers["rows"], "train", generator)]
    valid = task.sample(200, "valid", generator)
    options: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.01, "batch_tokens": 2600}

    def learn() -> tuple[PreTrainedModel, dict[str, Any]]:
        model = sft(relative_model(task, seed=seed), examples, numbers["start"], SFTConfig(**options), seed)
        pieces = 0
        while pieces < numbers["pieces"] and evaluate(model, task, valid, max_new=33)["accuracy"] < ENOUGH:
            sft(model, examples, PIECE, SFTConfig(**options, warmup=0), mix_seed(seed, pieces))
            pieces += 1
        return model, {"updates": numbers["start"] + PIECE * pieces}

    def learn_larger() -> tuple[PreTrainedModel, dict[str, Any]]:
        return sft(relative_model(task, layers=3, width=192, seed=seed), examples, updates, SFTConfig(**options), seed), {}

    model, report = kept(out / "base", task, learn)
    updates = report["updates"]
    return model, kept(out / "larger", task, learn_larger)[0]


def learn_values(model: PreTrainedModel, task: Task, config: test_time.Config, out: Path) -> dict[str, PreTrainedModel]:
    """The verifiers, by the names of the choices that they make."""

    @cache
    def solutions() -> list[Valued]:
        generator = torch.Generator().manual_seed(mix_seed(config.seed, 1001))
        rows = task.sample(config.process_problems, "train", generator)
        return roll_out(model, task, rows, config.process_samples, config.rollouts, config)

    def learn(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        labels = {
            WEIGHTED: lambda: solutions(),
            OUTCOME: lambda: outcomes(solutions()),
            NO_ROLLOUTS: lambda: [replace(x, values=x.values[-1:] * len(x.ends)) for x in solutions()],
        }[name]()
        verifier, losses = train_values(model, task, labels, config.process_steps, config, config.seed)
        return verifier, {"solutions": len(labels), "held_out_losses": losses}

    folders = {WEIGHTED: "process", OUTCOME: "outcome", NO_ROLLOUTS: "without-rollouts"}
    return {name: kept(out / folder, task, partial(learn, name))[0] for name, folder in folders.items()}


def kept(
    folder: Path, task: Task, make: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a folder, and its report; if there is none, what ``make`` returns, which is saved there."""
    if not folder.exists():
        model, report = make()
        save_model(folder, model, task, report)
    return load_model(folder, relative_model(task)).eval(), read_json(folder / REPORT, dict[str, Any])


def by_half(rows: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """A method's accuracy with the budget of four solutions, on easy and on hard problems."""
    found: dict[str, float | None] = {}
    for half, difficulties in {"four_easy": EASY, "four_hard": HARD}.items():
        some = [row for row in rows if row["difficulty"] in difficulties and name in row["accuracy"]]
        problems = sum(row["problems"] for row in some)
        right = sum(row["accuracy"][name][FOUR] * row["problems"] for row in some)
        found[half] = right / problems if problems else None
    return found


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def gap(run: str, control: str, name: str = "accuracy") -> list[float | None]:
        pairs = [(figure(x, run, name), figure(x, control, name)) for x in results]
        return [None if None in pair else pair[0] - pair[1] for pair in pairs]

    best_vote = "A vote weighted by a process verifier solves more problems than a majority of as many solutions."
    process = "A process verifier, which learnt from rollouts, ranks solutions better than an outcome verifier."
    beam = "With the tokens of four solutions, beam search solves more hard problems than best-of-N weighted."
    sequential, in_parallel = "sequential, verifier", "chains of 1"
    return [
        *gaps(best_vote, results, WEIGHTED, ["majority"], 0.02),
        *gaps(process, results, WEIGHTED, [OUTCOME], 0.02, name="auc"),
        *gaps(beam, results, BEAM, [WEIGHTED], 0.05, name="four_hard"),
        least("process verifier less outcome verifier, weighted vote", gap(WEIGHTED, OUTCOME), 0.0),
        least("process verifier less outcome verifier, best of k", gap(WEIGHTED, OUTCOME, "best"), 0.0),
        least("process verifier, weighted vote less best of k", gap(WEIGHTED, BEST), -0.01),
        least("beam search less look-ahead search", gap(BEAM, LOOKAHEAD), 0.0),
        least("beam search less the same by likelihood, four solutions", gap(BEAM, LIKELIHOOD, "four"), 0.0),
        least("process verifier, weighted vote less the likeliest", gap(WEIGHTED, "likeliest"), 0.0),
        least("process verifier less one that learnt without rollouts", gap(WEIGHTED, NO_ROLLOUTS), 0.0),
        least("chains of revisions, verifier less majority", gap(sequential, "sequential, majority"), 0.0),
        least("chains of revisions less parallel attempts of the reviser", gap(sequential, in_parallel), 0.0),
        least("compute-optimal search less one search for all", gap("compute-optimal, search", "one for all, search"), -0.01),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def over_tokens(*names: str) -> dict[str, list[list[tuple[float, float]]]]:
        return {name: [[(x["tokens"], x["accuracy"]) for x in result["curves"][name]] for result in results] for name in names}

    def over_difficulty(*names: str) -> dict[str, list[list[tuple[float, float]]]]:
        rows = [result["by_difficulty"] for result in results]
        common = set.intersection(*({row["difficulty"] for row in several} for several in rows))
        return {
            name: [
                [(row["difficulty"], row["accuracy"][name][FOUR]) for row in several if row["difficulty"] in common]
                for several in rows
            ]
            for name in names
        }

    greedy = {
        name: [[(x["tokens"], x["accuracy"])] for x in points]
        for name, points in {
            "greedy": [result["greedy"] for result in results],
            "larger model, greedy": [result["larger"]["greedy"] for result in results],
        }.items()
    }
    tokens, right = "tokens generated a problem", "accuracy"
    panels(
        path,
        TITLE,
        [
            Panel(tokens, right, over_tokens(WEIGHTED, OUTCOME, NO_ROLLOUTS, "majority", "oracle") | greedy, log=True),
            Panel(tokens, right, over_tokens(WEIGHTED, BEAM, LOOKAHEAD, "compute-optimal, search"), log=True),
            Panel(tokens, right, over_tokens("chains of 1", *CHAINS, "compute-optimal, splits"), log=True),
            Panel(
                "difficulty", "accuracy with the tokens of 4 solutions", over_difficulty(WEIGHTED, BEAM, LOOKAHEAD, "majority")
            ),
        ],
    )
    return (
        "Accuracy over tokens of solutions side by side, of searches and of chains of revisions, and over difficulty. A token "
        "of the larger model counts as many as its weights are times those of the model. Thin lines are seeds, thick ones "
        "their mean"
    )
