"""Of several solutions to a problem, which one? The choice of a verifier that learnt from right and wrong solutions of other
problems (V-STaR), votes, the likeliest one, and a verifier that learnt from shuffled labels; and what the same number of tokens
buys when attempts revise each other.

The samples are of the base model, which is also the verifier's reference, at temperature 1. A verifier sees no pair twice.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from experiments_checks import figure, least, most
from small_base import base

from quietstar.batches import mix_seed
from quietstar.recipes import test_time
from quietstar.recipes.verifier import make_pairs, measure_pairs, train_verifier
from quietstar.recipes.vstar import Config, compare, draw

TITLE = "V-STaR and test-time compute"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"problems": 40, "samples": 4, "updates": 2, "test_problems": 20, "test_samples": 4},
    "quick": {"problems": 7000, "samples": 8, "updates": 900, "test_problems": 400, "test_samples": 16},
    "full": {"problems": 9000, "samples": 8, "updates": 1800, "test_problems": 800, "test_samples": 32},
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, task = base(seed, size)
    config = Config(**SIZES[size], max_new=20, seed=seed, beta=0.1, verifier_rate=3e-4, pair_batch=32, pairs=16)
    solutions = draw(model, task, config, 2)  # any round but the first, which stops where nothing is right
    if size == "tiny":  # a base of five updates solves nothing
        solutions = [{**x, "right": i % 3 == 0} for i, x in enumerate(solutions)]
    pairs, held_out = (make_pairs(solutions, split, config.pairs, seed) for split in ("train", "valid"))
    choose = random.Random(seed)
    shuffled = [(prompt, *choose.sample(both, 2)) for prompt, *both in pairs]

    test = task.sample(config.test_problems, "test", torch.Generator().manual_seed(mix_seed(seed, 5)))
    result: dict[str, Any] = {"rows": [], "pairs": len(pairs)}
    verifiers = {}
    for name, some in (("verifier", pairs), ("verifier, shuffled labels", shuffled[: len(pairs) // 3])):
        verifier, _ = train_verifier(model, task, some, config, seed)
        found = compare(model, verifier, model, task, test, config)
        measured = measure_pairs(verifier, model, held_out, config.beta, config.batch_size)
        result["rows"].append(
            {
                "run": name,
                "accuracy": found["curves"]["verifier"][-1],
                "auc": found["auc"],
                "auc_ratio": found["auc_ratio"],
                **measured,
            }
        )
        verifiers[name] = verifier
        result.setdefault("k", found["k"])
        result.setdefault("curves", found["curves"])
    for name in ("verifier, ratio", "verifier, mean", "weighted vote", "majority", "generator", "one sample", "oracle"):
        result["rows"].append({"run": name, "accuracy": result["curves"][name][-1]})

    if size != "tiny":
        spend = test_time.Config(
            out=str(out / "test_time"),
            problems=config.test_problems,
            samples=config.test_samples,
            attempts=config.test_samples,
            revise_steps=300,
            revise_problems=3000,
            max_new=20,
            seed=seed,
        )
        scorer = test_time.likelihood_scorer(verifiers["verifier"])
        report = test_time.solve(model, task, spend, scorer)
        result["test_time"] = report["curves"]
        result["rows"].append({"run": "greedy", "accuracy": report["greedy"]["accuracy"]})
        for name in ("sequential, majority", "sequential, verifier", "sequential, last"):
            result["rows"].append({"run": name, "accuracy": report["curves"][name][-1]["accuracy"]})
    return result


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def above(run: str, other: str) -> list[float]:
        return [figure(result, run) - figure(result, other) for result in results]

    shuffled = [figure(result, "verifier, shuffled labels", "auc_ratio") for result in results]
    return [
        least("verifier, above the majority", above("verifier", "majority"), 0.08),
        least("verifier, above the generator's choice", above("verifier", "generator"), 0.04),
        least("verifier, AUC", [figure(result, "verifier", "auc") for result in results], 0.80),
        least("majority, above one sample", above("majority", "one sample"), 0.08),
        least("generator's choice, above one sample", above("generator", "one sample"), 0.12),
        least("verifier of shuffled labels, AUC of what it added to the reference", shuffled, 0.45),
        most("verifier of shuffled labels, AUC of what it added to the reference", shuffled, 0.55),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    from experiments_plot import lines

    shown = ("oracle", "verifier", "weighted vote", "majority", "generator", "one sample")
    curves = {name: [result["curves"][name] for result in results] for name in shown}
    lines(path, results[0]["k"], curves, "k, solutions to choose from", "accuracy", TITLE, log=True)
    return "Accuracy of the chosen one of k solutions, every seed thin and their mean thick"
