"""V-STaR: the wrong solutions of STaR's rounds teach a verifier what the right ones have (arXiv 2402.06457).

Each round draws solutions and trains a fresh copy of the first model on all right ones so far. All of them, right and wrong,
make the pairs that a verifier learns from by DPO, with the supervised start as its reference. Tested, it picks the best of k.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from quietstar.files import write_whole
from quietstar.recipes import solve as test_time
from quietstar.recipes.common import plots
from quietstar.recipes.common.budgets import powers
from quietstar.recipes.common.evaluation import evaluate
from quietstar.recipes.common.log import Pace, tell
from quietstar.recipes.common.models import option
from quietstar.recipes.common.rounds import REPORT, Rounds, fingerprint, load_model, save_model
from quietstar.recipes.common.sampling import Completion, Sampling, rollout
from quietstar.recipes.common.selectors import Selector, auc, best_of, choice_of, majority, pass_at, score, weighted
from quietstar.recipes.common.sft import Example, SFTConfig, sft
from quietstar.recipes.star import never
from quietstar.recipes.tasks import Row, Task
from quietstar.recipes.vstar_verifier import DPO, Solution, make_pairs, measure_pairs, train_verifier
from quietstar.run.batches import mix_seed

VOTES: dict[str, Selector] = {"majority": majority, "weighted vote": weighted}


@dataclass
class Config(SFTConfig, Sampling, DPO):
    """V-STaR's numbers; the learning rate and batches are those of the generator.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/vstar", "folder of the run: round-00 (the start), round-01, ..., verifier")
    rounds: int = option(3, "how often to draw solutions and train the generator on the right ones")
    problems: int = option(2000, "training problems to draw solutions of, in each round")
    samples: int = option(8, "solutions of each")
    sft_problems: int = option(2000, "problems whose own chains the start learns from")
    sft_steps: int = option(0, "steps of the start; 0 where the model solves problems already")
    steps: int = option(200, "training steps of the generator, each round")
    test_problems: int = option(400, "test problems to measure on")
    test_samples: int = option(16, "N, solutions of each of them")

    def __post_init__(self) -> None:
        for part in (SFTConfig, Sampling, DPO):
            part.__post_init__(self)
        least = {"sft_steps": 0, "samples": 2, "test_samples": 2}
        names = ("rounds", "problems", "sft_problems", "steps", "test_problems")
        for name, n in {**dict.fromkeys(names, 1), **least}.items():
            if getattr(self, name) < n:
                raise ValueError(f"vstar: {name} must be {n} or more, got {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise ValueError(f"vstar: temperature must be above 0, or all samples are one, got {self.temperature!r}")


def vstar(
    model: PreTrainedModel, task: Task, config: Config, name: str = "", resume: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    """Run all rounds, train the verifier, measure both; writes vstar.json and, with matplotlib, vstar.png beside them.

    Args:
        name: of the model, which a run that goes on must have begun with.
        resume: go on behind the last whole round of ``config.out``, if there is one.

    Returns:
        Generator, verifier and the figures: rounds, verifier (pairs, loss, its share of held-out pairs in the right order and
        of right above wrong test solutions, AUC) and curves of accuracy over k, as ``test_time.solve`` has them over tokens.

    Raises:
        ValueError: no chains to start from, no right solution in the first round, or no problem with right and wrong ones.
    """
    free = ("out", "rounds", "batch_size")
    settings = {option: value for option, value in asdict(config).items() if option not in free}
    run = Rounds(config.out, {"recipe": "vstar", "model": name, "task": task.name} | settings, resume)
    generator = torch.Generator().manual_seed(mix_seed(config.seed, 0))
    test = task.sample(config.test_problems, "test", generator)
    rows = task.sample_with_chain(config.sft_problems, generator) if config.sft_steps else []
    own = [{"prompt": row.prompt_ids, "ids": task.completion_ids(row), "right": True, "split": "train"} for row in rows]
    if config.sft_steps and not own:
        raise ValueError("vstar: sft_steps needs problems with chains, and the data have none")
    base = fingerprint(model)
    if run.done < 0:
        start = sft(copy.deepcopy(model), right_ones(own), config.sft_steps, config, config.seed) if own else model
        figures = evaluate(start, task, test, config.max_new, batch_size=config.batch_size)
        run.save(0, start, task, {"round": 0, "base": base, **figures}, solutions=[])
    elif run.report(0)["base"] != base:
        raise ValueError(f"{config.out}: the run there began with another model")
    for number in range(run.done + 1, config.rounds + 1):
        began = time.perf_counter()
        solutions = draw(run.model(number - 1, model), task, config, number)
        before = [x for earlier in range(number) for x in run.rows(earlier, "solutions")]
        right = right_ones(before + solutions)
        if not right:
            raise ValueError(f"vstar: round {number} has no right solution; the rounds before it are in {config.out}")
        examples = right_ones(own + before + solutions)
        seed = mix_seed(config.seed, number)
        current = sft(copy.deepcopy(model), examples, config.steps, config, seed, run.log("vstar", number))
        counts = {"drawn": len(solutions), "drawn_right": sum(x["right"] for x in solutions), "distinct": len(right)}
        figures = {"steps": config.steps, **evaluate(current, task, test, config.max_new, batch_size=config.batch_size)}
        report = {"round": number, "base": base, **counts, **figures, "seconds": time.perf_counter() - began}
        run.save(number, current, task, report, solutions=solutions)
    last = run.model(config.rounds, model)
    solutions = [x for number in range(1, config.rounds + 1) for x in run.rows(number, "solutions")]
    verifier, learnt = verify_with(run, model, task, config, solutions + own)
    written = write(last, task, test, config)
    found = compare(written, verifier, run.model(0, model), task, test, config)
    report = {"rounds": run.reports(), "verifier": learnt, **found}
    write_whole(run.out / "vstar.json", json.dumps(report, indent=2) + "\n")
    title = f"{task.name}, {len(test)} test problems"
    shown = {name: [points] for name, points in steady(report["k"], report["curves"]).items()}
    shown["greedy"] = [[(1, report["rounds"][config.rounds]["accuracy"])]]
    plots.panels(run.out / "vstar.png", title, [plots.Panel("k, solutions to choose from", "accuracy", shown, log=True)])
    return last, verifier, report


def draw(model: PreTrainedModel, task: Task, config: Config, number: int) -> list[Solution]:
    """A round's solutions: of training problems, and of a tenth as many that the verifier is only measured on."""
    generator = torch.Generator().manual_seed(mix_seed(config.seed, number))
    found: list[Solution] = []
    pace = Pace()
    for split, count in (("train", config.problems), ("valid", max(1, config.problems // 10))):
        rows = task.sample(count, split, generator)
        for start in range(0, len(rows), config.batch_size):
            if pace.due():
                tell(config.out, {"round": number, "tried": start, "kept": sum(x["right"] for x in found)})
            batch = rows[start : start + config.batch_size]
            seed = mix_seed(mix_seed(config.seed, number), len(found))
            written = rollout(model, task, [row.prompt_ids for row in batch], config.samples, seed=seed, **config.sampling)
            graded = [
                [(task.trimmed(x.ids), task.check(row, x.ids)) for x in several]
                for row, several in zip(batch, written, strict=True)
            ]
            if number == 1 and not found and not any(right for several in graded for _, right in several):
                raise ValueError(f"vstar: {never(task, batch, [several[0][0] for several in graded])}")
            found += [
                {"prompt": row.prompt_ids, "ids": ids, "right": right, "split": split}
                for row, several in zip(batch, graded, strict=True)
                for ids, right in several
            ]
    return found


def right_ones(solutions: Sequence[Solution]) -> list[Example]:
    """The right solutions of training problems, each once."""
    found = {(tuple(x["prompt"]), tuple(x["ids"])): None for x in solutions if x["right"] and x["split"] == "train"}
    return [(list(prompt), list(ids)) for prompt, ids in found]


def verify_with(
    run: Rounds, model: PreTrainedModel, task: Task, config: Config, solutions: Sequence[Solution]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The verifier of a run, trained unless it is there already for as many rounds."""
    folder = run.out / "verifier"
    if folder.exists():
        report = json.loads((folder / REPORT).read_text())
        if report["rounds"] == config.rounds:
            return load_model(folder, model), report
    pairs, held_out = (make_pairs(solutions, split, config.pairs, config.seed) for split in ("train", "valid"))
    if not pairs:
        raise ValueError("vstar: no problem has both right and wrong solutions, and a verifier learns from such pairs")
    reference = run.model(0, model)
    verifier, losses = train_verifier(reference, task, pairs, config, config.seed)
    log = run.log("vstar, verifier", config.rounds)
    for number, loss in enumerate(losses):
        log({"step": number + 1, "loss": loss})
    report = {"rounds": config.rounds, "base": run.report(0)["base"], "pairs": len(pairs), "updates": len(losses)}
    report |= {"first_loss": losses[0], "last_loss": losses[-1]} | measure_pairs(
        verifier, reference, held_out, config.beta, config.batch_size
    )
    save_model(folder, verifier, task, report)
    return verifier, report


def write(generator: PreTrainedModel, task: Task, test: Sequence[Row], config: Config) -> list[list[Completion]]:
    """N solutions of each test problem."""
    prompts = [row.prompt_ids for row in test]
    return rollout(generator, task, prompts, config.test_samples, seed=mix_seed(config.seed, -1), **config.sampling)


def compare(
    written: Sequence[Sequence[Completion]],
    verifier: PreTrainedModel,
    reference: PreTrainedModel,
    task: Task,
    test: Sequence[Row],
    config: Config,
) -> dict[str, Any]:
    """Accuracy over k of the verifier's choice, of the votes and of the generator's own; and the verifier's AUC.

    "ratio" is what the verifier has learnt: its log-probability less that of the reference.
    """
    samples = test_time.measure(task, test, written, test_time.likelihood_scorer(verifier, config.batch_size))
    under_reference = test_time.measure(task, test, written, test_time.likelihood_scorer(reference, config.batch_size))
    right = [[x.right for x in several] for several in samples]
    scores = {
        "verifier": [[score(x) for x in several] for several in samples],
        "verifier, mean": [[score(x) / x.tokens for x in several] for several in samples],
        "verifier, ratio": [
            [score(x) - score(y) for x, y in zip(*pair, strict=True)] for pair in zip(samples, under_reference, strict=True)
        ],
        "generator": [[x.logprob for x in several] for several in samples],
    }
    ks = powers(len(right[0]))
    curves = {"one sample": [fmean(map(fmean, right))] * len(ks)}
    for name, values in scores.items():
        curves[name] = [fmean(best_of(k, x, y) for x, y in zip(values, right, strict=True)) for k in ks]
    for name, pick in VOTES.items():
        curves[name] = [fmean(choice_of(k, several, pick) for several in samples) for k in ks]
    curves["oracle"] = [fmean(pass_at(k, x) for x in right) for k in ks]
    return {
        "k": ks,
        "curves": curves,
        "auc": auc(scores["verifier"], right),
        "auc_ratio": auc(scores["verifier, ratio"], right),
    }


def steady(ks: Sequence[int], curves: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
    """The points to plot: up to half of the N solutions, and of the votes, means over few random choices, up to a quarter.

    Nearer to N all choices of k are nearly the same one. There a curve that turns down, since among more solutions there are
    more that fool the verifier, can't be told from luck.
    """
    return {
        name: [(k, y) for k, y in zip(ks, values, strict=True) if k <= max(1, ks[-1] // (4 if name in VOTES else 2))]
        for name, values in curves.items()
    }
