"""Sixteen solutions and a verifier win back what sampling costs, and no more: on fresh seeds a greedy answer, with a sixteenth
of the tokens, is right in 0.23, the best of 16 by a process verifier in 0.21, and a single sample in 0.09. So none of the
paper's claims is resolved, though the signs are its own where choices among samples are compared: a process verifier over an
outcome verifier, beam search on hard problems over a choice, a weighted vote on easy ones over beam search. One is not so: the
larger model solves 0.90 with a greedy answer, and even a perfect verifier of as many tokens 0.23 ("oracle", four). But that
says that a larger model learns faster, not what search is worth: the base is stopped in the middle of learning, once it solves
0.3 greedily, and the larger model, after as many updates, has learnt. Only temperature 1 was tried.

What the others fail by. The likelihood of a beginning ranks it as well as the verifier does, which begins as that likelihood: a
value's log-odds are the log-likelihood of the tokens so far plus a difference of two logits. Revisions keep a right attempt
less often than another sample is right, and mend a wrong one in 0.01. In one seed the base never learns: after 650 updates, the
most it gets, it solves 0.02. It counts as the others do; without it every verdict is the same.

What do more tokens at test time buy, and how are they best spent (arXiv 2408.03314)? A model that is half trained on 3 x
3-digit multiplication, whose solutions have five steps, solves a problem with as many tokens as 1 to 16 solutions have.

In parallel: it draws solutions, and a vote or a verifier chooses one. The process verifier has learnt the value of each step,
the share of rollouts from there that end right. The outcome verifier has learnt from the same solutions, for as many updates,
whether the whole is right; and the control "without rollouts" has learnt that after every step. Step by step: the process
verifier leads beam search. In sequence: chains of four attempts revise each other, after training on the model's own right
solutions, half of them at once and half after attempts, the last of which is wrong or is that solution already. A model with
three times the weights, which has learnt from the same examples, answers greedily.

Difficulty is measured on 16 other samples: none of level 5 is right, and levels 1 to 4 are quarters of the other problems.
Accuracies are those with the tokens of 16 solutions, "four" those with the tokens of four; "hard" is levels 3 and 4 and
"easiest" level 1, with the tokens of 8 and 16, "four easiest" level 1 with the tokens of four. "auc of beginnings" is how
often, of two rollouts from beginnings of one problem's solutions, the right one is from that with the higher value. "first",
"after right" and "after wrong" are shares of right attempts, in chains of revisions or among independent samples. Revisions
count only if first attempts are right at least 0.9 times as often as the base's. Oracle is any of the solutions.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from math import isqrt, nan
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch
from experiments_claims import Claim
from small_base import relative_model
from transformers import PreTrainedModel

from quietstar.files.reading import read_json
from quietstar.run.batches import mix_seed
from quietstar_recipes.common.evaluation import evaluate
from quietstar_recipes.common.logprobs import likelihoods
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.saving import REPORT, load_model, save_model
from quietstar_recipes.common.selectors import Sample, auc, best, hierarchical, majority, powers_of_two
from quietstar_recipes.common.solutions import to_samples
from quietstar_recipes.common.training import SFTConfig, sft
from quietstar_recipes.solve import run as test_time
from quietstar_recipes.solve.budgets import Chain, Table, alone, compute_optimal, curve, from_all, measure, oracle
from quietstar_recipes.solve.revisions import revise, train_reviser
from quietstar_recipes.solve.run import BEAM, BEST, WEIGHTED, draw, greedy, searched, side_by_side, write
from quietstar_recipes.solve.values import Valued, outcomes, roll_out, train_values, value_scorer, values
from quietstar_recipes.tasks import Multiplication, Row, Task

TITLE = "Test-time compute"
OUTCOME, NO_ROLLOUTS = "best of k, outcome verifier", "best of k, without rollouts"
LARGER = "larger model, greedy"
REVISIONS, VOTED = "revisions, process verifier", "revisions, majority"
OPTIMAL, ONE = "compute-optimal, search", "one for all, search"
CONTROLS = ("majority", "likeliest", "greedy")
FOUR, LARGE, ALL = 2, (3, 4), 4  # places of the budgets of 4 solutions, of 8 and 16, and of 16
EASIEST, HARD, UNSOLVED = 1, (3, 4), 5  # levels of difficulty
GATE = 0.9  # of the base's accuracy, which a reviser's first attempts need for its revisions to count

CLAIMS = (
    Claim(
        "The best of 16 solutions by a process verifier is right more often than by an outcome verifier, or without one.",
        BEST,
        (OUTCOME, NO_ROLLOUTS, *CONTROLS),
    ),
    Claim(
        "A process verifier ranks the beginnings of solutions better.",
        BEST,
        (OUTCOME, NO_ROLLOUTS, "likeliest"),
        "auc_of_beginnings",
    ),
    Claim(
        "Beam search solves more hard problems than a choice among as many solutions.",
        BEAM,
        (WEIGHTED, BEST, *CONTROLS),
        "hard",
    ),
    Claim("A weighted vote among as many solutions solves more easy problems than beam search.", WEIGHTED, (BEAM,), "easiest"),
    Claim("The search that suits a problem's difficulty solves more than one search for all.", OPTIMAL, (ONE,)),
    Claim(
        "With as many FLOPs as a larger model's greedy answer, the small one's beam search solves more.",
        BEAM,
        ((LARGER, "accuracy"),),
        "four",
    ),
    Claim("It does so on the problems that are easiest for it.", BEAM, ((LARGER, "easiest"),), "four_easiest"),
    Claim("Attempts that revise each other solve more than as many of the base.", REVISIONS, (BEST, WEIGHTED, *CONTROLS)),
)

# Digits of both factors; rows and updates of the base, in pieces until it solves ENOUGH of the validation problems.
BASE: dict[str, dict[str, int]] = {
    "tiny": {"digits": 2, "rows": 100, "start": 3, "pieces": 0},
    "quick": {"digits": 3, "rows": 8000, "start": 250, "pieces": 40},
    "full": {"digits": 3, "rows": 8000, "start": 250, "pieces": 40},
}
ENOUGH, PIECE = 0.3, 10
FIELDS = ("max_new", "samples", "problems", "valid_problems", "process_problems", "process_samples", "rollouts")
FIELDS += ("process_steps", "revise_problems", "revise_samples", "revise_steps")
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(zip(FIELDS, (14, 16, 10, 5, 20, 1, 1, 1, 20, 2, 1), strict=True)),
    "quick": dict(zip(FIELDS, (33, 16, 1000, 200, 8000, 1, 2, 300, 1000, 8, 200), strict=True)),
    "full": dict(zip(FIELDS, (33, 16, 1000, 500, 8000, 1, 4, 600, 2000, 16, 600), strict=True)),
}
BEGINNINGS = {"problems": 500, "solutions": 4, "rollouts": 4}  # on which verifiers of beginnings are judged
VERIFIER_RATE, REVISER_RATE = 5e-4, 3e-4  # learning rates


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    task = Multiplication(BASE[size]["digits"])
    options: dict[str, Any] = {**SIZES[size], "learning_rate": VERIFIER_RATE, "batch_tokens": 2600, "seed": seed}
    config = test_time.Config(out=str(out / "solve"), **options)
    model, larger = base(task, seed, size, out)
    if size == "tiny":  # a base of a few updates solves nothing
        task.answer = lambda row, ids: row.problem.right if sum(ids) % 3 else "0"  # type: ignore[method-assign]
    verifiers = learn_values(model, task, config, out)
    process = verifiers[BEST]
    reviser = kept(out / "reviser", task, lambda: (learn_to_revise(model, task, config), {}))[0]

    test, valid = (problems(task, config, split) for split in ("test", "valid"))
    written = write(model, task, test, config)
    samples = to_samples(task, test, written)
    unit = fmean(x.tokens for several in samples for x in several)
    budgets = [k * unit for k in powers_of_two(config.samples)]
    searches = searched(model, process, task, test, written, replace(config, lookahead=0), budgets)
    tables = side_by_side(samples, budgets, False) | {"oracle": oracle(samples, unit)} | searches
    for name in (OUTCOME, NO_ROLLOUTS):
        scored = to_samples(task, test, written, value_scorer(verifiers[name], task))
        tables[name] = measure([alone(x) for x in scored], from_all(best), budgets)

    elsewhere = replace(config, seed=mix_seed(seed, 2), lookahead=0)
    tried = searched(model, process, task, valid, write(model, task, valid, elsewhere), elsewhere, budgets)
    # Other samples than those that are spent, which would already know how they end.
    again = replace(config, seed=mix_seed(seed, 3))
    of_valid, of_test = (draw(model, task, several, again, value_scorer(process, task)) for several in (valid, test))
    found, chosen = compute_optimal(of_valid, of_test, tried, searches)
    tables |= {f"{name}, search": table for name, table in found.items()}

    times = larger.num_parameters() / model.num_parameters()
    tables["greedy"] = [greedy(model, task, test, config)] * len(budgets)
    tables[LARGER] = [greedy(larger, task, test, config, times)] * len(budgets)
    length = isqrt(config.samples)
    chains = revise(reviser, task, test, [length] * length, config, value_scorer(process, task))
    tables[REVISIONS], tables[VOTED] = (measure(chains, pick, budgets) for pick in (hierarchical, from_all(majority)))

    levels = difficulties(of_test)
    rows: dict[str, dict[str, Any]] = {name: {"run": name, **figures(table, levels)} for name, table in tables.items()}
    for name, value in judge_beginnings(model, verifiers, task, test, config).items():
        rows[name]["auc_of_beginnings"] = value
    attempts = [chain for several in chains for chain in several]
    rows["one sample"] |= in_turn(samples)
    rows[REVISIONS] |= in_turn(attempts)
    if fmean(chain[0].right for chain in attempts) < GATE * fmean(x.right for several in samples for x in several):
        rows[REVISIONS]["accuracy"] = None
    return {
        "rows": list(rows.values()),
        "curves": {name: curve(table, budgets) for name, table in tables.items()},
        "levels": {name: by_level(table, levels) for name, table in tables.items()},
        "chosen": chosen,
    }


def problems(task: Task, config: test_time.Config, split: str) -> list[Row]:
    """Test problems, those of ``solve``, or validation problems."""
    number, turn = (config.problems, 0) if split == "test" else (config.valid_problems, -4)
    return task.sample(number, split, torch.Generator().manual_seed(mix_seed(config.seed, turn)))


def difficulties(samples: Sequence[Sequence[Sample]]) -> list[int]:
    """Of each problem: UNSOLVED if no sample is right, and quarters of the others, 1 the easiest."""
    shares = [fmean(x.right for x in several) for several in samples]
    edges = quantiles([-x for x in shares if x], n=UNSOLVED - 1, method="inclusive")
    return [1 + bisect(edges, -x) if x else UNSOLVED for x in shares]


def figures(table: Table, levels: Sequence[int]) -> dict[str, float | None]:
    """A row's figures: accuracies, and the tokens that were used."""

    def share(budgets: Sequence[int], wanted: Sequence[int]) -> float | None:
        right = [x.right for budget in budgets for x, level in zip(table[budget], levels, strict=True) if level in wanted]
        return fmean(right) if right else None

    every = range(1, UNSOLVED + 1)
    return {
        "accuracy": share([ALL], every),
        "four": share([FOUR], every),
        "hard": share(LARGE, HARD),
        "easiest": share(LARGE, [EASIEST]),
        "four_easiest": share([FOUR], [EASIEST]),
        "tokens": fmean(x.tokens for x in table[ALL]),
    }


def by_level(table: Table, levels: Sequence[int]) -> list[tuple[int, float]]:
    """The accuracy of each level, with budgets of 8 and of 16 solutions."""
    right = defaultdict(list)
    for budget in LARGE:
        for x, level in zip(table[budget], levels, strict=True):
            right[level].append(x.right)
    return [(level, fmean(of_level)) for level, of_level in sorted(right.items())]


def in_turn(chains: Sequence[Chain]) -> dict[str, float | None]:
    """How often attempts are right: the first one, and those after a right and after a wrong one."""
    right = [[x.right for x in chain] for chain in chains]
    after: dict[bool, list[bool]] = {True: [], False: []}
    for chain in right:
        for before, x in pairwise(chain):
            after[before].append(x)
    kept, mended = (fmean(after[before]) if after[before] else None for before in (True, False))
    return {"first": fmean(chain[0] for chain in right), "after_right": kept, "after_wrong": mended}


def judge_beginnings(
    model: PreTrainedModel, verifiers: dict[str, PreTrainedModel], task: Task, rows: list[Row], config: test_time.Config
) -> dict[str, float | None]:
    """For each verifier and the likelihood: how often, of two rollouts from beginnings of one problem's solutions that are
    equally many steps long, the right one is from the beginning with the higher value."""
    number, solutions, rollouts = BEGINNINGS.values()
    found = roll_out(model, task, rows[:number], solutions, rollouts, replace(config, seed=mix_seed(config.seed, 4)))
    shares = {
        (x.problem, step, tuple(x.ids[:end])): share
        for x in found
        for step, (end, share) in enumerate(zip(x.ends[:-1], x.values, strict=False))
    }
    prompts, begun = [rows[i].prompt_ids for i, _, _ in shares], [list(ids) for _, _, ids in shares]
    judged = {name: values(verifier, task, prompts, begun) for name, verifier in verifiers.items()}
    judged["likeliest"] = likelihoods(model, prompts, begun)

    def ranked(judgements: list[float]) -> float | None:
        groups: dict[tuple[int, int], list[tuple[float, bool]]] = defaultdict(list)
        for ((i, step, _), share), value in zip(shares.items(), judgements, strict=True):
            right = round(share * rollouts)
            groups[i, step] += [(value, True)] * right + [(value, False)] * (rollouts - right)
        return auc([[x for x, _ in group] for group in groups.values()], [[x for _, x in group] for group in groups.values()])

    return {name: ranked(judgements) for name, judgements in judged.items()}


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
            BEST: lambda: solutions(),
            OUTCOME: lambda: outcomes(solutions()),
            NO_ROLLOUTS: lambda: [replace(x, values=x.values[-1:] * len(x.ends)) for x in solutions()],
        }[name]()
        verifier, losses = train_values(model, task, labels, config.process_steps, config, config.seed)
        return verifier, {"solutions": len(labels), "held_out_losses": losses}

    folders = {BEST: "process", OUTCOME: "outcome", NO_ROLLOUTS: "without-rollouts"}
    return {name: kept(out / folder, task, partial(learn, name))[0] for name, folder in folders.items()}


def learn_to_revise(model: PreTrainedModel, task: Task, config: test_time.Config) -> PreTrainedModel:
    rows = task.sample(config.revise_problems, "train", torch.Generator().manual_seed(mix_seed(config.seed, -1)))
    rates = replace(config, learning_rate=REVISER_RATE)
    return train_reviser(model, task, rows, config.revise_samples, config.revise_steps, rates, config)


def kept(
    folder: Path, task: Task, make: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a folder, and its report; if there is none, what ``make`` returns, which is saved there."""
    if not folder.exists():
        model, report = make()
        save_model(folder, model, task, report)
    return load_model(folder, relative_model(task)).eval(), read_json(folder / REPORT, dict[str, Any])


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def over_tokens(*names: str) -> dict[str, list[list[tuple[float, float]]]]:
        return {name: [[(x["tokens"], x["accuracy"]) for x in result["curves"][name]] for result in results] for name in names}

    single = {name: [points[:1] for points in of_seeds] for name, of_seeds in over_tokens("greedy", LARGER).items()}
    # A seed that solves few problems has none of some levels.
    every = sorted({level for result in results for level, _ in result["levels"][BEST]})
    levels = {
        name: [[(level, dict(result["levels"][name]).get(level, nan)) for level in every] for result in results]
        for name in (BEST, WEIGHTED, BEAM, "greedy", LARGER)
    }
    tokens, right = "tokens generated a problem", "accuracy"
    panels(
        path,
        TITLE,
        [
            Panel(tokens, right, over_tokens(BEST, OUTCOME, NO_ROLLOUTS, "likeliest", "majority") | single, log=True),
            Panel(tokens, right, over_tokens(BEST, WEIGHTED, BEAM, OPTIMAL, ONE, REVISIONS), log=True),
            Panel("difficulty", "accuracy, tokens of 8 and 16", levels),
        ],
    )
    return (
        "Accuracy over tokens of choices among solutions, of searches and of revisions, and over difficulty. A token of the "
        "larger model counts as many as its weights are times those of the model. Thin lines are seeds, thick ones their mean"
    )
