"""Among a generator's solutions a vote that a verifier weighs is better than a plain vote or the likelihood (0.72 against
0.64); but a generator that learns as long as generator and verifier together is better, 0.84, since one sample of it is right
in 0.77, against 0.49. What three rounds add to one is not resolved: with three, some of 16 solutions are right for 0.86 of the
problems, with one for 0.84. V-STaR beside the baselines of its paper (arXiv 2402.06457), with as many samples of each training
problem for all.

In three rounds, V-STaR draws 8 samples of each problem and trains a fresh copy of the base on all right ones so far; then a
verifier learns from pairs of right and wrong ones. In one round, the base draws all 24 samples at once. SFT is the base, RFT
the generator of one round, STaR that of three, and all of them answer by majority. The others choose by a verifier;
verification is the base with that of one round. "STaR, trained longer" learns from the right ones of all rounds for as many
updates as STaR's last round and the verifier. The paper has 16 samples per round, as has the full size, but here a verifier
needs more problems rather than more samples: 7,000 are nearly all that there are.

A generator takes 30 updates per round, after which it still learns: with a generator that is trained out, as in the paper, a
verifier would have less to mend. No verifier was tried on the solutions of "STaR, trained longer".

An outcome verifier learns from the same solutions whether they are right. Read off as a verdict after the solution, as usual,
this is beyond two layers, which would have to predict each token, compare it, and gather the results; so another one adds the
verdict to the solution's log-likelihood, and is about as good as V-STaR. Verdicts alone are little better than chance (AUC
0.53), so that beating them says nothing about pairs.

All answers are chosen from 16 solutions of the same test problems. The verifiers by DPO see each pair once. Chance for a
verifier is one distinct solution, not one sample: right solutions are often equal, and equal ones have one score, so that many
different wrong ones compete with one right one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiments_claims import Claim, figure
from small_base import base
from transformers import PreTrainedModel
from verdicts import train_outcome, verdict_scorer

from quietstar.files.reading import json_lines
from quietstar.run.batches import mix_seed
from quietstar_recipes.common.evaluation import evaluate
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.selectors import auc, best, likeliest, majority, score, weighted
from quietstar_recipes.common.solutions import Scorer, likelihood_scorer, to_samples
from quietstar_recipes.common.training import SFTConfig, sft
from quietstar_recipes.solve.values import Valued, train_values, value_scorer
from quietstar_recipes.tasks import Row, Task
from quietstar_recipes.vstar.run import Config, right_solutions, vstar, write
from quietstar_recipes.vstar.verifier import Pair, Solution, make_pairs, train_verifier

TITLE = "V-STaR"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"problems": 20, "rounds": 2, "samples": 2, "steps": 2, "updates": 2, "pair_batch": 4, "test_problems": 10},
    "quick": {"problems": 7000, "samples": 8, "steps": 30, "updates": 1000, "test_problems": 800},
    "full": {"problems": 7000, "steps": 30, "updates": 1000, "test_problems": 800},
}
OUTCOME_STEPS = {"tiny": 10, "quick": 400, "full": 2000}
BETAS: dict[str, tuple[float, ...]] = {"tiny": (), "quick": (), "full": (0.02, 0.5)}  # of DPO, beside 0.1
BATCH = 1024  # solutions to generate or to score at once
RFT, STAR, VERIFICATION, ONE, VSTAR = "RFT", "STaR", "verification", "V-STaR, one round", "V-STaR"
VERDICT, OUTCOME = "V-STaR, verdicts", "V-STaR, verdicts and likelihood"
SHUFFLED = "V-STaR, shuffled labels"
EARLIER, LONGER = "V-STaR, verifier of one round", "STaR, trained longer"
ANSWERS = tuple((run, name) for run in (STAR, LONGER) for name in ("accuracy", "greedy", "likeliest"))
CLAIMS = (
    Claim(
        "A vote that a verifier weighs is better than STaR's answers, also if the generator learns as long as both.",
        VSTAR,
        ANSWERS,
        "weighted_vote",
    ),
    Claim("Verifier and generator of three rounds are better than those of one.", VSTAR, (VERIFICATION, ONE, EARLIER)),
    Claim("Pairs teach a verifier more than verdicts do, alone or added to the likelihood.", VSTAR, (VERDICT, OUTCOME)),
)


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, task = base(seed, size)
    if size == "tiny":  # a base of five updates solves nothing
        task.check = lambda row, ids: sum(ids) % 3 == 0
    config = Config(out=str(out / "three-rounds"), max_new=20, batch_size=BATCH, seed=seed, **SIZES[size])
    once = replace(config, out=str(out / "one-round"), rounds=1, samples=config.rounds * config.samples)
    generator, verifier, report = vstar(model, task, config, resume=True)
    generator_once, verifier_once, report_once = vstar(model, task, once, resume=True)

    test = task.sample(config.test_problems, "test", torch.Generator().manual_seed(mix_seed(seed, 5)))
    by_base, by_once, by_star = (Generated(x, task, test, config) for x in (model, generator_once, generator))
    own, own_once = likelihood_scorer(verifier, BATCH), likelihood_scorer(verifier_once, BATCH)
    rows = [
        {"run": "SFT", **by_base.voted()},
        {"run": RFT, **by_once.voted()},
        {"run": STAR, **by_star.voted()},
        {"run": VERIFICATION, **by_base.chosen(own_once)},
        {"run": ONE, **by_once.chosen(own_once)},
        {"run": VSTAR, **by_star.chosen(own)},
        {"run": EARLIER, **by_star.chosen(own_once)},
    ]
    solutions = drawn(Path(config.out), config.rounds)
    longer = sft(copy.deepcopy(model), right_solutions(solutions), config.steps + config.updates, config, seed)
    rows.append({"run": LONGER, **Generated(longer, task, test, config).voted()})
    outcome = train_outcome(model, task, solutions, OUTCOME_STEPS[size], SFTConfig(learning_rate=1e-3), seed)
    rows.append({"run": VERDICT, **by_star.chosen(verdict_scorer(outcome, task, BATCH))})
    valued, _ = train_values(model, task, whole(solutions), OUTCOME_STEPS[size], SFTConfig(), seed)
    rows.append({"run": OUTCOME, **by_star.chosen(value_scorer(valued, task, BATCH))})
    pairs = make_pairs(solutions, "train", config.pairs, seed)
    if size != "quick":
        rows.append({"run": "verifier as generator", **Generated(verifier, task, test, config).voted()})
        # Exactly half of the pairs are reversed: random labels would have more of one kind, and the verifier would learn that.
        shuffled = [(prompt, *both[:: -1 if i % 2 else 1]) for i, (prompt, *both) in enumerate(pairs)]
        rows.append({"run": SHUFFLED, **by_star.chosen(of_pairs(model, task, shuffled, config))})
    for beta in BETAS[size]:
        scorer = of_pairs(model, task, pairs, replace(config, beta=beta))
        rows.append({"run": f"V-STaR, beta {beta}", **by_star.chosen(scorer)})
    return {"rows": rows, "k": report["k"], "curves": {VSTAR: report["curves"], ONE: report_once["curves"]}}


class Generated:
    """Solutions of the test problems by one generator, and how many are right with different choices among them."""

    def __init__(self, model: PreTrainedModel, task: Task, test: Sequence[Row], config: Config):
        self.task, self.test = task, test
        self.written = write(model, task, test, config)
        self.greedy = evaluate(model, task, test, config.max_new, batch_size=config.batch_size)["accuracy"]

    def voted(self) -> dict[str, Any]:
        """The accuracy of the majority, and what the generator can do without a verifier."""
        samples = to_samples(self.task, self.test, self.written)
        distinct = [
            {tuple(x.ids): sample.right for x, sample in zip(*both, strict=True)}
            for both in zip(self.written, samples, strict=True)
        ]
        return {
            "accuracy": fmean(majority(x).right for x in samples),
            "greedy": self.greedy,
            "one_sample": fmean(fmean(x.right for x in several) for several in samples),
            "likeliest": fmean(likeliest(x).right for x in samples),
            "one_distinct": fmean(fmean(x.values()) for x in distinct),
            "best_possible": fmean(any(x.right for x in several) for several in samples),
        }

    def chosen(self, scorer: Scorer) -> dict[str, Any]:
        """The accuracy of a verifier's choice, and its AUC."""
        samples = to_samples(self.task, self.test, self.written, scorer)
        scores, right = ([[f(x) for x in several] for several in samples] for f in (score, lambda x: x.right))
        by_vote = fmean(weighted(x).right for x in samples)
        return {"accuracy": fmean(best(x).right for x in samples), "weighted_vote": by_vote, "auc": auc(scores, right)}


def drawn(folder: Path, rounds: int) -> list[Solution]:
    """The solutions of all rounds of a run."""
    files = [folder / f"round-{number:02d}" / "solutions.jsonl" for number in range(1, rounds + 1)]
    return [row for file in files for _, row in json_lines(file, Solution)]


def whole(solutions: Sequence[Solution]) -> list[Valued]:
    """Training solutions whose value is 1 or 0, right or wrong, at their end."""
    shown = [x for x in solutions if x["split"] == "train"]
    problem = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(x["prompt"]) for x in shown))}
    return [Valued(problem[tuple(x["prompt"])], x["prompt"], x["ids"], [len(x["ids"])], [float(x["right"])]) for x in shown]


def of_pairs(model: PreTrainedModel, task: Task, pairs: Sequence[Pair], config: Config) -> Scorer:
    """A new verifier that has learnt from these pairs."""
    return likelihood_scorer(train_verifier(model, task, pairs, config, config.seed)[0], BATCH)


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def over_k(run: str, curve: str) -> list[list[tuple[int, float]]]:
        return [list(zip(result["k"], result["curves"][run][curve], strict=True)) for result in results]

    curves = {f"{run}, {curve}": over_k(run, curve) for run in (VSTAR, ONE) for curve in ("oracle", "verifier", "majority")}
    accuracy = {row["run"]: [figure(result, row["run"]) for result in results] for row in results[0]["rows"]}
    k = Panel("k, solutions to choose from", "accuracy", curves, log=True)
    panels(path, TITLE, [k, Panel("accuracy with 16 solutions", "", bars=accuracy)])
    return (
        "Accuracy on test problems over the number of solutions to choose from, after three rounds and after "
        "one; and with 16 solutions for all methods. Thin lines and dots are seeds, thick lines and bars their mean"
    )
