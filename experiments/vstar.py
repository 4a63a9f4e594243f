"""Which of several solutions to a problem should be chosen? Compared are the choices of a verifier that learnt from right and
wrong solutions of other problems (V-STaR), of one that learnt to say whether a solution is right ("outcome"), and of one that
learnt from shuffled labels; votes; and the likeliest solution. Shuffled labels teach a verifier to trust likely solutions less,
so that it ranks below chance.

A second question is what the same number of tokens buys when attempts revise each other: in long chains, and in chains whose
length is chosen for each difficulty on validation problems. All figures are for 16 solutions. The samples are from the base
model, which is also the verifier's reference model in DPO, at temperature 1. A verifier sees no pair twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiments_checks import figure, least, most
from small_base import base

from quietstar.recipes import solve as test_time
from quietstar.recipes import solve_compute_optimal as compute_optimal
from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.common.selectors import auc, best_of, score
from quietstar.recipes.common.sft import SFTConfig
from quietstar.recipes.common.solutions import likelihood_scorer, to_samples
from quietstar.recipes.vstar import Config, compare, draw, reliable_points, write
from quietstar.recipes.vstar_verifier import make_pairs, measure_pairs, train_outcome, train_verifier, verdict_scorer
from quietstar.run.batches import mix_seed

TITLE = "V-STaR and test-time compute"
K = 16  # solutions to choose from
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"problems": 40, "samples": 4, "updates": 3, "test_problems": 20, "test_samples": K},
    "quick": {"problems": 7000, "samples": 8, "updates": 900, "test_problems": 400, "test_samples": 64},
    "full": {"problems": 9000, "samples": 8, "updates": 1800, "test_problems": 800, "test_samples": 128},
}
SPENT: dict[str, dict[str, Any]] = {
    "tiny": {"problems": 20, "valid_problems": 10, "revise_steps": 0},
    "quick": {"problems": 300, "valid_problems": 400, "revise_steps": 500, "revise_problems": 3000, "learning_rate": 1e-3},
    "full": {"problems": 800, "valid_problems": 1600, "revise_steps": 600, "revise_problems": 3000, "learning_rate": 1e-3},
}
VERIFIER, OUTCOME, SHUFFLED = "verifier", "verifier, outcome", "verifier, shuffled labels"
PARALLEL, CHAINS = "parallel, by the reviser", "sequential, verifier"
SPLITS = (PARALLEL, CHAINS, compute_optimal.ONE, compute_optimal.PREDICTED, compute_optimal.MEASURED)


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, task = base(seed, size)
    config = Config(**SIZES[size], max_new=20, seed=seed, beta=0.1, verifier_rate=3e-4, pair_batch=32, pairs=16)
    solutions = draw(model, task, config, 2)  # a round other than the first, which stops where nothing is right
    if size == "tiny":  # a base of five updates solves nothing
        solutions = [{**x, "right": i % 3 == 0} for i, x in enumerate(solutions)]
    pairs, held_out = (make_pairs(solutions, split, config.pairs, seed) for split in ("train", "valid"))
    # Exactly half of the pairs are reversed: random labels would have more of one kind, and the verifier would learn that.
    shuffled = [(prompt, *both[:: -1 if i % 2 else 1]) for i, (prompt, *both) in enumerate(pairs[: len(pairs) // 6 * 2])]

    test = task.sample(config.test_problems, "test", torch.Generator().manual_seed(mix_seed(seed, 5)))
    written = write(model, task, test, config)
    result: dict[str, Any] = {"rows": [], "pairs": len(pairs)}
    verifiers = {}
    for name, some, N in ((VERIFIER, pairs, config.test_samples), (SHUFFLED, shuffled, K)):
        verifiers[name], losses = train_verifier(model, task, some, config, seed)
        found = compare([several[:N] for several in written], verifiers[name], model, task, test, config)
        at = found["k"].index(K)
        figures = {"accuracy": found["curves"]["verifier"][at], "auc": found["auc"], "auc_ratio": found["auc_ratio"]}
        measured = measure_pairs(verifiers[name], model, held_out, config.beta, config.batch_size)
        result["rows"].append({"run": name, **figures, "updates": len(losses), **measured})
        result = {"k": found["k"], "curves": found["curves"]} | result
    updates = config.updates // 3  # which see about as many solutions as there are in the pairs
    verdicts = train_outcome(model, task, solutions, updates, SFTConfig(), seed)
    samples = to_samples(task, test, written, verdict_scorer(verdicts, task))
    scores, right = ([[f(x) for x in several] for several in samples] for f in (score, lambda x: x.right))
    accuracy = fmean(best_of(K, *x) for x in zip(scores, right, strict=True))
    result["rows"].append({"run": OUTCOME, "accuracy": accuracy, "auc": auc(scores, right), "updates": updates})
    for name in ("verifier, ratio", "verifier, mean", "weighted vote", "majority", "generator", "one sample", "oracle"):
        result["rows"].append({"run": name, "accuracy": result["curves"][name][at]})

    spending = test_time.Config(out=str(out / "test_time"), samples=K, attempts=K, max_new=20, seed=seed, **SPENT[size])
    report = test_time.solve(model, task, spending, likelihood_scorer(verifiers[VERIFIER]))
    result |= {"test_time": report["curves"], "greedy": report["greedy"], "splits": report["splits"]}
    result["rows"].append({"run": "greedy", "accuracy": report["greedy"]["accuracy"]})
    for name in (*SPLITS, "sequential, majority", "sequential, last"):
        result["rows"].append({"run": name, "accuracy": report["curves"][name][-1]["accuracy"]})
    return result


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def above(run: str, other: str) -> list[float]:
        return [figure(result, run) - figure(result, other) for result in results]

    shuffled = [figure(result, SHUFFLED, "auc_ratio") for result in results]
    return [
        least("verifier, above the majority", above(VERIFIER, "majority"), 0.08),
        least("verifier, above the generator's choice", above(VERIFIER, "generator"), 0.04),
        least("verifier, AUC", [figure(result, VERIFIER, "auc") for result in results], 0.80),
        least("majority, above one sample", above("majority", "one sample"), 0.08),
        least("generator's choice, above one sample", above("generator", "one sample"), 0.12),
        most("verifier of shuffled labels, AUC of what it added to the reference model", shuffled, 0.55),
    ]


def by_difficulty(results: list[dict[str, Any]]) -> dict[str, list[list[tuple[float, float]]]]:
    """For each length of chains, a curve per seed over the difficulties that all seeds have."""
    measured = [[row for row in result["splits"] if row["bins"] == compute_optimal.MEASURED] for result in results]
    common = set.intersection(*({row["difficulty"] for row in rows} for rows in measured))
    return {
        f"chains of {length}": [
            [(row["difficulty"], row["accuracy"][length]) for row in rows if row["difficulty"] in common] for rows in measured
        ]
        for length in measured[0][0]["accuracy"]
    }


def over_tokens(results: list[dict[str, Any]], names: Sequence[str]) -> dict[str, list[list[tuple[float, float]]]]:
    """A curve per seed for each of these methods, and the point of the greedy answer."""
    points = {name: [result["test_time"][name] for result in results] for name in names}
    points["greedy"] = [[result["greedy"]] for result in results]
    return {name: [[(x["tokens"], x["accuracy"]) for x in seed] for seed in seeds] for name, seeds in points.items()}


def plot(results: list[dict[str, Any]], path: Path) -> str:
    shown = ("oracle", "verifier", "weighted vote", "majority", "generator", "one sample")
    over_k = [reliable_points(result["k"], result["curves"]) for result in results]
    side_by_side = ("oracle", "best of k", "weighted vote", "majority", "likeliest")
    panels(
        path,
        TITLE,
        [
            Panel("k, solutions to choose from", "accuracy", {name: [x[name] for x in over_k] for name in shown}, log=True),
            Panel("tokens generated a problem", "accuracy", over_tokens(results, side_by_side), log=True),
            Panel("tokens generated a problem", "accuracy", over_tokens(results, (*SPLITS, "sequential, majority")), log=True),
            Panel("difficulty, by the share of right samples", "accuracy at the largest budget", by_difficulty(results)),
        ],
    )
    return (
        "Accuracy of the solution chosen from k; accuracy over tokens, side by side and in chains; and accuracy for each "
        "difficulty, by the length of chains. Thin lines are seeds, thick lines their mean. Curves over k end at half of "
        "the solutions drawn, those of votes at a quarter: closer to all of them a curve averages over too few choices to "
        "show that it turns down"
    )
