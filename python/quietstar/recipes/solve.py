"""What more tokens at test time buy: votes, a verifier's choice, and attempts that revise each other, at equal budgets.

In parallel: N solutions of each problem, from which a selector takes one. In sequence: chains of attempts, each of which sees
up to four earlier ones. A budget is a number of generated tokens per problem, and each method gets as many whole solutions as
fit.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quietstar.arguments.fields import check, check_at_least, check_types
from quietstar.config import option
from quietstar.files.writing import write_whole
from quietstar.recipes.common import plots
from quietstar.recipes.common.sampling import Completion, Sampling, rollout
from quietstar.recipes.common.selectors import Sample, Selector, best, likeliest, majority, powers_of_two, weighted
from quietstar.recipes.common.sft import Example, SFTConfig, sft
from quietstar.recipes.common.solutions import VISIBLE_ATTEMPTS, Scorer, revision_prompt, to_samples
from quietstar.recipes.solve_budgets import Chain, Spent, curve, lengths, oracle, split, summary
from quietstar.recipes.solve_compute_optimal import BINS, MEASURED, Drawn, compute_optimal
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed
from quietstar.run.lock import alone_in_out

__all__ = ["Config", "draw", "solve"]

Chains = Sequence[Sequence[Chain]]  # the chains of each problem


@dataclass
class Config(SFTConfig, Sampling):
    """How much is spent on which problems.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/solve", "folder for samples, figures and the plot")
    problems: int = option(400, "test problems")
    samples: int = option(16, "N, solutions of each problem")
    attempts: int = option(8, "attempts in a chain of revisions, rounded down to a power of 2; 0 for no chains")
    revise_steps: int = option(0, "training steps on revisions of the model's own wrong attempts, before it revises")
    revise_problems: int = option(2000, "training problems for those steps")
    valid_problems: int = option(0, "validation problems, to choose the length of chains by difficulty; 0 leaves that out")

    def __post_init__(self) -> None:
        check_types("solve", self)
        for part in (SFTConfig, Sampling):
            part.__post_init__(self)
        check_at_least("solve", self, 1, ("problems", "samples", "revise_problems"))
        check_at_least("solve", self, 0, ("attempts", "revise_steps", "valid_problems"))
        check("solve", self, "temperature", self.temperature > 0, "above 0, or all samples are one")


@alone_in_out(Config)
def solve(model: PreTrainedModel, task: Task, config: Config, scorer: Scorer | None = None) -> dict[str, Any]:
    """Measure all methods on the same test problems.

    Writes samples.jsonl, chains.jsonl, test_time.json and, with matplotlib, test_time.png into ``config.out``.

    Args:
        scorer: of a verifier; without one, the methods that need it are left out.

    Returns:
        task, problems, greedy (accuracy, low, high, tokens) and curves: for each method its points, with budget, accuracy, low,
        high, and tokens, the mean number used. With validation problems also splits, the rows of ``compute_optimal``.

    Raises:
        ValueError: no solution has an answer that can be read, or there are too few validation problems.
    """
    rows = task.sample(config.problems, "test", torch.Generator().manual_seed(mix_seed(config.seed, 0)))
    valid_rows = validation_rows(task, config)
    parallel = draw(model, task, rows, config, scorer)
    if not any(x.answer is not None for samples in parallel for x in samples):
        raise ValueError(f"solve: no solution of {len(rows)} problems has an answer that can be read")
    out = Path(config.out)
    save_lines(out / "samples.jsonl", [[asdict(x) for x in samples] for samples in parallel])
    likeliest_tokens = {**config.sampling, "temperature": 0}
    answers = to_samples(task, rows, rollout(model, task, [row.prompt_ids for row in rows], **likeliest_tokens))
    unit = sum(x.tokens for samples in parallel for x in samples) / (len(rows) * config.samples)
    budgets = [k * unit for k in powers_of_two(config.samples)]
    alone = [[[x] for x in samples] for samples in parallel]
    curves = {name: curve(alone, pick, budgets) for name, pick in selectors(scorer is not None).items()}
    curves["oracle"] = oracle(parallel, unit)
    report: dict[str, Any] = {"task": task.name, "problems": len(rows), "config": asdict(config)}
    report |= {"greedy": summary([Spent(x.right, x.tokens) for [x] in answers]), "curves": curves}
    chains: Chains = []
    if config.attempts:
        reviser = train_reviser(model, task, config) if config.revise_steps else model
        chains = revise(reviser, task, rows, config, scorer)
        save_lines(out / "chains.jsonl", [[[asdict(x) for x in chain] for chain in problem] for problem in chains])
        curves |= sequential_curves(chains, budgets, scorer is not None)
    if valid_rows:
        elsewhere = replace(config, seed=mix_seed(config.seed, -3))
        drawn = draw(model, task, valid_rows, elsewhere, scorer)
        valid = Drawn(drawn, revise(reviser, task, valid_rows, elsewhere, scorer))
        pick = best if scorer else majority
        curves["parallel, by the reviser"] = curve([split(problem, 1) for problem in chains], pick, budgets)
        chosen, report["splits"] = compute_optimal(valid, Drawn(parallel, chains), pick, budgets)
        curves |= chosen
    write_whole(out / "test_time.json", json.dumps(report, indent=2) + "\n")
    plot(report, out / "test_time.png")
    return report


def validation_rows(task: Task, config: Config) -> list[Row]:
    """Validation problems, if chains are to be split by difficulty; otherwise none.

    Raises:
        ValueError: fewer problems than bins of difficulty.
    """
    if not (config.valid_problems and config.attempts):
        return []
    drawn, again = (torch.Generator().manual_seed(mix_seed(config.seed, -4)) for _ in range(2))
    found = len(task.problems(config.valid_problems, "valid", drawn))
    if found < BINS:
        raise ValueError(
            f"solve: valid_problems={config.valid_problems} must be {BINS} or more, and the data must have as many: got {found}"
        )
    return task.sample(config.valid_problems, "valid", again)


def sequential_curves(chains: Chains, budgets: Sequence[float], verified: bool) -> dict[str, list[dict[str, Any]]]:
    """Curves of the longest chains, one chain after the other."""
    longest = [split(problem, len(problem[0])) for problem in chains]
    picks: dict[str, Selector] = {"majority": majority, "last": lambda samples: samples[-1]}
    picks |= {"verifier": best} if verified else {}
    return {f"sequential, {name}": curve(longest, pick, budgets) for name, pick in picks.items()}


def selectors(verified: bool) -> dict[str, Selector]:
    """Selectors by the names that reports give them."""
    plain: dict[str, Selector] = {"one sample": lambda samples: samples[0], "majority": majority, "likeliest": likeliest}
    return plain | {"best of k": best, "weighted vote": weighted} if verified else plain


def draw(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, scorer: Scorer | None) -> list[list[Sample]]:
    """N samples of each row."""
    prompts = [row.prompt_ids for row in rows]
    written = rollout(model, task, prompts, config.samples, seed=mix_seed(config.seed, 1), **config.sampling)
    return to_samples(task, rows, written, scorer)


def revise(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, scorer: Scorer | None = None) -> Chains:
    """Chains of attempts at each row: only chains of full length or, with validation problems, those of all splits."""
    most, longest = (powers_of_two(x)[-1] for x in (config.samples, min(config.samples, config.attempts)))
    until = lengths(most, longest) if config.valid_problems else [longest] * (most // longest)
    owners = [row for row in rows for _ in until]
    chains: list[list[Completion]] = [[] for _ in owners]
    for number in range(longest):
        going = [i for i in range(len(owners)) if number < until[i % len(until)]]
        prompts = [revision_prompt(task, owners[i], [task.trimmed(x.ids) for x in chains[i]]) for i in going]
        seed = mix_seed(config.seed, 2 + number)
        for i, completions in zip(going, rollout(model, task, prompts, seed=seed, **config.sampling), strict=True):
            chains[i] += completions
    found = to_samples(task, owners, chains, scorer)
    return [found[start : start + len(until)] for start in range(0, len(found), len(until))]


def train_reviser(model: PreTrainedModel, task: Task, config: Config) -> PreTrainedModel:
    """A copy of the model that has learnt to write a right solution after 0 to 4 wrong ones of its own.

    Raises:
        ValueError: no training problem has a right solution to learn from.
    """
    generator = torch.Generator().manual_seed(mix_seed(config.seed, -1))
    rows = task.sample(config.revise_problems, "train", generator)
    prompts = [row.prompt_ids for row in rows]
    written = rollout(model, task, prompts, 2 * VISIBLE_ATTEMPTS, seed=mix_seed(config.seed, -2), **config.sampling)
    choose = random.Random(config.seed)
    examples = [x for row, solutions in zip(rows, written, strict=True) for x in revisions(task, row, solutions, choose)]
    if not examples:
        raise ValueError(f"solve: none of {len(rows)} training problems has a right solution to learn revisions from")
    return sft(copy.deepcopy(model), examples, config.revise_steps, config, config.seed)


def revisions(task: Task, row: Row, written: Sequence[Completion], choose: random.Random) -> list[Example]:
    """At most one example of a row: wrong attempts, most similar to the right one last, followed by that right one.

    Empty if no solution is right.
    """
    solutions = [task.trimmed(x.ids) for x in written]
    right = [ids for ids in solutions if task.check(row, ids)]
    wrong = [ids for ids in solutions if not task.check(row, ids)]
    if not right:
        return []
    target = choose.choice(right)
    shown = choose.sample(wrong, min(choose.randint(0, VISIBLE_ATTEMPTS), len(wrong)))
    shown.sort(key=lambda ids: SequenceMatcher(None, ids, target, autojunk=False).ratio())
    return [(revision_prompt(task, row, shown), target)]


def save_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy over tokens, of parallel solutions and of chains, and a bar per split in each bin of difficulty."""
    greedy = {"greedy": [[(report["greedy"]["tokens"], report["greedy"]["accuracy"])]]}
    curves = {name: [[(x["tokens"], x["accuracy"]) for x in points]] for name, points in report["curves"].items()}
    in_parallel = {name: seeds for name, seeds in curves.items() if name in (*selectors(True), "oracle")}
    chains = {name: seeds for name, seeds in curves.items() if name not in in_parallel}
    panels = [
        plots.Panel("tokens generated per problem", "accuracy", shown | greedy, log=True)
        for shown in (in_parallel, chains)
        if shown
    ]
    for row in report.get("splits", []):
        if row["bins"] == MEASURED:
            label = f"accuracy, difficulty {row['difficulty']}, {row['problems']} problems"
            bars = {f"chains of {attempts}": [accuracy] for attempts, accuracy in row["accuracy"].items()}
            panels.append(plots.Panel(label, "", bars=bars))
    plots.panels(path, f"{report['task']}, {report['problems']} test problems", panels)
