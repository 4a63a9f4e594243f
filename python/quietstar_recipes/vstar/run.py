"""V-STaR: the wrong solutions of STaR's rounds teach a verifier what sets the right ones apart (arXiv 2402.06457).

Each round samples solutions and trains a fresh copy of the first model on all right ones so far. All solutions, right and
wrong, form the pairs from which a verifier learns by DPO, with the supervised start as its reference model. At test time the
verifier picks the best of k solutions.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from quietstar.config import option
from quietstar.files.reading import read_json
from quietstar.run.batches import mix_seed
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings
from quietstar_kernels.checks import check, check_at_least, check_types
from quietstar_recipes.common import plots, saving, selectors
from quietstar_recipes.common.evaluation import evaluate, measure, nothing_solved
from quietstar_recipes.common.log import batches_of_round
from quietstar_recipes.common.sampling import Completion, Sampling, Solutions, rollout
from quietstar_recipes.common.saving import Rounds, fingerprint, hashes, load_model
from quietstar_recipes.common.selectors import Selector, powers_of_two, score
from quietstar_recipes.common.solutions import likelihood_scorer, to_samples
from quietstar_recipes.common.training import Example, SFTConfig, rows_with_chains, sft
from quietstar_recipes.tasks import Row, Task
from quietstar_recipes.vstar.verifier import DPO, Solution, make_pairs, measure_pairs, train_verifier

VOTES: dict[str, Selector] = {"majority": selectors.majority, "weighted vote": selectors.weighted}


@dataclass
class Config(SFTConfig, Sampling, DPO):
    """The options of V-STaR; the learning rate and batches are those of the generator."""

    out: str = option("runs/vstar", "folder of the run: round-00 (the start), round-01, ..., verifier", may_differ=True)
    rounds: int = option(3, "how often to draw solutions and train the generator on the right ones", may_differ=True)
    problems: int = option(2000, "training problems to sample solutions of, in each round")
    samples: int = option(16, "solutions of each problem in each round")
    sft_problems: int = option(2000, "problems whose own chains the supervised start learns from")
    sft_steps: int = option(0, "steps of the supervised start; 0 if the model solves problems already")
    steps: int = option(200, "training steps of the generator in each round")
    test_problems: int = option(400, "test problems for the accuracy")
    valid_problems: int = option(400, "validation problems, by which the best round is chosen")
    test_samples: int = option(16, "N, solutions of each test problem")

    def __post_init__(self) -> None:
        check_types("vstar", self)
        for part in (SFTConfig, Sampling, DPO):
            part.__post_init__(self)
        check_at_least("vstar", self, 1, ("rounds", "problems", "sft_problems", "steps", "test_problems", "valid_problems"))
        check_at_least("vstar", self, 0, ("sft_steps",))
        check_at_least("vstar", self, 2, ("samples", "test_samples"))
        check("vstar", self, "temperature", self.temperature > 0, "above 0, or all samples are one")


@alone_in_out(Config)
def vstar(
    model: PreTrainedModel, task: Task, config: Config, name: str = "", resume: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    """Run all rounds, train the verifier and measure both.

    Writes the rounds, the verifier, vstar.json and, with matplotlib, vstar.png into ``config.out``, where the link best leads
    to the round whose greedy answers to validation problems are best. The verifier is measured on solutions of the last one.

    Returns:
        Generator, verifier and the report: rounds; verifier (number of pairs, first and last loss, on held-out pairs the loss
        and the share in the right order, and the accuracy of its own greedy answers); k and curves, accuracies over k; and auc
        and auc_ratio on test solutions.

    Raises:
        ValueError: no chains for the supervised start, no right solution in the first batch or in a round, or no problem with
            both right and wrong solutions.
    """
    # 1. The problems, and the solutions that the data have.
    run = Rounds(config.out, Settings.of(config, recipe="vstar", model=name, task=task.name, inputs=hashes(task)), resume)
    generator = torch.Generator().manual_seed(mix_seed(config.seed, 0))
    test = task.sample(config.test_problems, "test", generator)
    valid = task.sample(config.valid_problems, "valid", torch.Generator().manual_seed(mix_seed(config.seed, -2)))
    rows = rows_with_chains(task, config.sft_problems, generator, "vstar") if config.sft_steps else []
    own = [Solution(prompt=row.prompt_ids, ids=task.completion_ids(row), right=True, split="train") for row in rows]
    # 2. The start, and the rounds that the run lacks.
    base = fingerprint(model)
    if run.done < 0:
        start = sft(copy.deepcopy(model), right_solutions(own), config.sft_steps, config, config.seed) if own else model
        figures = measure(start, task, test, valid, config)
        run.save(0, start, task, {"round": 0, "base": base, **figures}, solutions=[])
    elif run.report(0)["base"] != base:
        raise ValueError(f"{config.out}: the run there started with another model")
    for number in range(run.done + 1, config.rounds + 1):
        began = time.perf_counter()
        solutions = draw(load_model(run.folder(number - 1), model), task, config, number)
        before = [x for earlier in range(number) for x in run.rows(earlier, "solutions", Solution)]
        right = right_solutions(before + solutions)
        if not right:
            raise ValueError(f"vstar: round {number} has no right solution; the rounds before it are in {config.out}")
        examples = right_solutions(own + before + solutions)
        seed = mix_seed(config.seed, number)
        current = sft(copy.deepcopy(model), examples, config.steps, config, seed, run.log("vstar", number))
        counts = {"drawn": len(solutions), "drawn_right": sum(x["right"] for x in solutions)}
        counts["distinct"] = len({(*prompt, *ids) for prompt, ids in right})
        figures = {"steps": config.steps, **measure(current, task, test, valid, config)}
        report = {"round": number, "base": base, **counts, **figures, "seconds": time.perf_counter() - began}
        run.save(number, current, task, report, solutions=solutions)
    # 3. The verifier, which learns from the solutions of all rounds, and what it chooses from those of the last generator.
    last = load_model(run.folder(config.rounds), model)
    solutions = [x for number in range(1, config.rounds + 1) for x in run.rows(number, "solutions", Solution)]
    verifier, learnt = train_or_load_verifier(run, model, task, config, solutions + own)
    written = write(last, task, test, config)
    found = compare(written, verifier, load_model(run.folder(0), model), task, test, config)
    learnt["accuracy"] = evaluate(verifier, task, test, config.max_new, batch_size=config.batch_size)["accuracy"]
    # 4. The report and its plot.
    report = {"rounds": run.reports(), "verifier": learnt, **found}
    saving.write_json(run.out / "vstar.json", report)
    title = f"{task.name}, {len(test)} test problems"
    shown = {name: [points] for name, points in reliable_points(report["k"], report["curves"]).items()}
    shown["greedy"] = [[(1, report["rounds"][config.rounds]["accuracy"])]]
    plots.panels(run.out / "vstar.png", title, [plots.Panel("k, solutions to choose from", "accuracy", shown, log=True)])
    return last, verifier, report


def draw(model: PreTrainedModel, task: Task, config: Config, number: int) -> list[Solution]:
    """The solutions of a round: of training problems, and of a tenth as many problems that the verifier is only measured on."""
    generator = torch.Generator().manual_seed(mix_seed(config.seed, 1))
    found: list[Solution] = []
    for split, count in (("train", config.problems), ("valid", max(1, config.problems // 10))):
        rows = task.sample(count, split, generator)
        for _, batch in batches_of_round(rows, config, number, lambda: sum(x["right"] for x in found)):
            seed = mix_seed(mix_seed(config.seed, number), len(found))
            written = rollout(model, task, [row.prompt_ids for row in batch], config.samples, seed=seed, **config.sampling)
            drawn: list[Solution] = [
                {"prompt": row.prompt_ids, "ids": task.trimmed(x.ids), "right": task.check(row, x.ids), "split": split}
                for row, completions in zip(batch, written, strict=True)
                for x in completions
            ]
            if number == 1 and not found and not any(x["right"] for x in drawn):
                first_of_each = [x["ids"] for x in drawn[:: config.samples]]
                raise ValueError(f"vstar: {nothing_solved(task, batch, first_of_each)}")
            found.extend(drawn)
    return found


def right_solutions(solutions: Sequence[Solution]) -> list[Example]:
    """The right solutions of training problems, as often as they were drawn; see ``make_pairs``."""
    return [(x["prompt"], x["ids"]) for x in solutions if x["right"] and x["split"] == "train"]


def train_or_load_verifier(
    run: Rounds, model: PreTrainedModel, task: Task, config: Config, solutions: Sequence[Solution]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The verifier of a run; trained unless the run already has one after as many rounds."""
    folder = run.out / "verifier"
    if folder.exists():
        report = read_json(folder / saving.REPORT, dict[str, Any])
        if report["rounds"] == config.rounds:
            return load_model(folder, model), report
    pairs, held_out = (make_pairs(solutions, split, config.pairs, config.seed) for split in ("train", "valid"))
    if not pairs:
        raise ValueError("vstar: no problem has both right and wrong solutions, which a verifier needs to learn from")
    reference = load_model(run.folder(0), model)
    verifier, losses = train_verifier(reference, task, pairs, config, config.seed)
    log = run.log("vstar, verifier", config.rounds)
    for number, loss in enumerate(losses):
        log({"step": number + 1, "loss": loss})
    report = {"rounds": config.rounds, "base": run.report(0)["base"], "pairs": len(pairs), "updates": len(losses)}
    report |= {"first_loss": losses[0], "last_loss": losses[-1]} | measure_pairs(
        verifier, reference, held_out, config.beta, config.batch_size
    )
    saving.save_model(folder, verifier, task, report)
    return verifier, report


def write(generator: PreTrainedModel, task: Task, test: Sequence[Row], config: Config) -> list[list[Completion]]:
    """N solutions of each test problem."""
    prompts = [row.prompt_ids for row in test]
    return rollout(generator, task, prompts, config.test_samples, seed=mix_seed(config.seed, -1), **config.sampling)


def compare(
    written: Solutions, verifier: PreTrainedModel, reference: PreTrainedModel, task: Task, test: Sequence[Row], config: Config
) -> dict[str, Any]:
    """Accuracy over k of the verifier's choice, of votes and of the generator's own choice; and the verifier's AUC.

    "ratio" is what the verifier has learnt: its log-probability minus that of the reference model.
    """
    samples = to_samples(task, test, written, likelihood_scorer(verifier, config.batch_size))
    under_reference = to_samples(task, test, written, likelihood_scorer(reference, config.batch_size))
    right = [[x.right for x in problem] for problem in samples]
    scores = {
        "verifier": [[score(x) for x in problem] for problem in samples],
        "verifier, mean": [[score(x) / x.tokens for x in problem] for problem in samples],
        "verifier, ratio": [
            [score(x) - score(y) for x, y in zip(*pair, strict=True)] for pair in zip(samples, under_reference, strict=True)
        ],
        "generator": [[x.logprob for x in problem] for problem in samples],
    }
    ks = powers_of_two(len(right[0]))
    curves = {"one sample": [fmean(map(fmean, right))] * len(ks)}
    for name, values in scores.items():
        curves[name] = [fmean(selectors.best_of(k, x, y) for x, y in zip(values, right, strict=True)) for k in ks]
    for name, pick in VOTES.items():
        curves[name] = [fmean(selectors.choice_of(k, problem, pick) for problem in samples) for k in ks]
    curves["oracle"] = [fmean(selectors.pass_at(k, x) for x in right) for k in ks]
    return {
        "k": ks,
        "curves": curves,
        "auc": selectors.auc(scores["verifier"], right),
        "auc_ratio": selectors.auc(scores["verifier, ratio"], right),
    }


def reliable_points(ks: Sequence[int], curves: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
    """The points to plot: up to half of the N solutions, and for votes, means over a few random subsets, up to a quarter.

    Close to N, all subsets of size k are nearly the same. A curve that falls there, because more solutions contain more that
    fool the verifier, can't be told from chance.
    """
    return {
        name: [(k, y) for k, y in zip(ks, values, strict=True) if k <= max(1, ks[-1] // (4 if name in VOTES else 2))]
        for name, values in curves.items()
    }
