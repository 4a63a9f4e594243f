"""What more tokens at test time buy: votes, a verifier's choice, search over steps, and attempts that revise each other.

In parallel: N solutions of each problem, from which a selector takes one. Step by step: N candidates, of which a process
verifier keeps the best. In sequence: chains of attempts, each of which sees up to four earlier ones. A budget is a number of
generated tokens per problem, and each method gets as many whole solutions as fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quietstar.arguments.fields import check_at_least, check_types
from quietstar.config import option
from quietstar.files.writing import write_whole
from quietstar.recipes.common import plots
from quietstar.recipes.common.rounds import save_model
from quietstar.recipes.common.sampling import rollout
from quietstar.recipes.common.selectors import Sample, powers_of_two
from quietstar.recipes.common.sft import SFTConfig
from quietstar.recipes.common.solutions import Scorer, to_samples
from quietstar.recipes.solve_budgets import Spent, Table, curve, oracle, summary
from quietstar.recipes.solve_compute_optimal import BINS, by_difficulty, compute_optimal
from quietstar.recipes.solve_methods import Models, Spending, Tables, chain_lengths, side_by_side, spend_all, write
from quietstar.recipes.solve_revisions import train_chain_verifier, train_reviser
from quietstar.recipes.solve_values import roll_out, train_values
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed
from quietstar.run.lock import alone_in_out

__all__ = ["Config", "draw", "solve", "train_process_verifier"]

LARGER = "larger model, majority"


@dataclass
class Config(SFTConfig, Spending):
    """How much is spent on which problems; the learning rate and batches are those of the reviser and of all verifiers.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/solve", "folder for samples, figures and the plot")
    problems: int = option(400, "test problems")
    revise_steps: int = option(0, "training steps on revisions of the model's own wrong attempts, before it revises")
    revise_problems: int = option(2000, "training problems for those steps, and for the verifier of chains")
    revise_samples: int = option(64, "solutions of each of them to learn revisions from")
    judge_steps: int = option(0, "training steps of a verifier of the chains' attempts; 0 scores them as solutions")
    history: bool = option(True, "whether that verifier sees the earlier attempts")
    process_steps: int = option(0, "training steps of a process verifier, which leads a search; 0 for none")
    process_problems: int = option(1000, "training problems for those steps")
    process_samples: int = option(16, "solutions of each of them")
    rollouts: int = option(16, "rollouts from each of their steps, which give its value")

    def __post_init__(self) -> None:
        check_types("solve", self)
        for part in (SFTConfig, Spending):
            part.__post_init__(self)
        counts = ("revise_problems", "revise_samples", "process_problems", "process_samples", "rollouts")
        check_at_least("solve", self, 1, ("problems", *counts))
        check_at_least("solve", self, 0, ("revise_steps", "judge_steps", "process_steps"))


@alone_in_out(Config)
def solve(
    model: PreTrainedModel,
    task: Task,
    config: Config,
    scorer: Scorer | None = None,
    process: PreTrainedModel | None = None,
    larger: tuple[PreTrainedModel, Task] | None = None,
) -> dict[str, Any]:
    """Measure all methods on the same test problems.

    Writes samples.jsonl, chains.jsonl, test_time.json and, with matplotlib, test_time.png into ``config.out``, and a process
    verifier that it trains into the folder process there.

    Args:
        scorer: of a verifier; without one, the methods that need it are left out.
        process: a process verifier, such as that of an earlier run, instead of a new one.
        larger: another model, and the same problems in its tokens. A token of it counts as many tokens as its weights are
            times those of ``model``, so that its budgets are equal in FLOPs (2 per weight and token, arXiv 2408.03314,
            section 7).

    Returns:
        task, problems, greedy (accuracy, low, high, tokens) and curves: for each method its points, with budget, accuracy, low,
        high, and tokens, the mean number used. With a larger model also larger: greedy, and times (as many weights). With
        validation problems also chosen, the rows of ``compute_optimal`` for each kind of method, and by_difficulty.

    Raises:
        ValueError: no solution has an answer that can be read, or there are too few validation problems.
    """
    rows = task.sample(config.problems, "test", torch.Generator().manual_seed(mix_seed(config.seed, 0)))
    valid_rows = validation_rows(task, config)
    written = write(model, task, rows, config)
    samples = to_samples(task, rows, written, scorer)
    if not any(x.answer is not None for several in samples for x in several):
        raise ValueError(f"solve: no solution of {len(rows)} problems has an answer that can be read")
    out = Path(config.out)
    save_lines(out / "samples.jsonl", [[asdict(x) for x in several] for several in samples])
    unit = sum(x.tokens for several in samples for x in several) / (len(rows) * config.samples)
    budgets = [k * unit for k in powers_of_two(config.samples)]
    models = train(model, task, config, scorer, process)
    kinds, chains = spend_all(models, task, rows, written, config, budgets)
    if chains:
        save_lines(out / "chains.jsonl", [[[asdict(x) for x in chain] for chain in problem] for problem in chains])
    tables = {name: table for of_kind in kinds.values() for name, table in of_kind.items()} | {"oracle": oracle(samples, unit)}
    report: dict[str, Any] = {"task": task.name, "problems": len(rows), "config": asdict(config)}
    report["greedy"] = greedy(model, task, rows, config)
    if larger:
        report["larger"], tables[LARGER] = with_larger(model, *larger, config, budgets)
    if valid_rows:
        report["by_difficulty"], report["chosen"], chosen = choose(models, task, valid_rows, rows, kinds, config, budgets)
        tables |= chosen
    report["curves"] = {name: curve(table, budgets) for name, table in tables.items()}
    write_whole(out / "test_time.json", json.dumps(report, indent=2) + "\n")
    plot(report, out / "test_time.png")
    return report


def validation_rows(task: Task, config: Config) -> list[Row]:
    """Validation problems, if ways of spending are to be chosen by difficulty; otherwise none.

    Raises:
        ValueError: fewer problems than bins of difficulty.
    """
    if not config.valid_problems:
        return []
    drawn, again = (torch.Generator().manual_seed(mix_seed(config.seed, -4)) for _ in range(2))
    found = len(task.problems(config.valid_problems, "valid", drawn))
    if found < BINS:
        raise ValueError(
            f"solve: valid_problems={config.valid_problems} must be {BINS} or more, and the data must have as many: got {found}"
        )
    return task.sample(config.valid_problems, "valid", again)


def train(model: PreTrainedModel, task: Task, config: Config, scorer: Scorer | None, process: PreTrainedModel | None) -> Models:
    """The models that ``config`` asks for."""
    if config.process_steps and process is None:
        process = train_process_verifier(model, task, config)
    reviser, judge = model, None
    if config.attempts and (config.revise_steps or config.judge_steps):
        rows = task.sample(config.revise_problems, "train", torch.Generator().manual_seed(mix_seed(config.seed, -1)))
        if config.revise_steps:
            reviser = train_reviser(model, task, rows, config.revise_samples, config.revise_steps, config, config)
        if config.judge_steps:
            attempts = chain_lengths(config)[0]
            judge = train_chain_verifier(
                reviser, model, task, rows, attempts, config.judge_steps, config, config, config.history
            )
    return Models(model, scorer, process, reviser, judge)


def train_process_verifier(model: PreTrainedModel, task: Task, config: Config) -> PreTrainedModel:
    """A process verifier of the model's solutions, which is saved in the folder process of ``config.out``."""
    rows = task.sample(config.process_problems, "train", torch.Generator().manual_seed(mix_seed(config.seed, -7)))
    solutions = roll_out(model, task, rows, config.process_samples, config.rollouts, config)
    process, losses = train_values(model, task, solutions, config.process_steps, config, config.seed)
    save_model(Path(config.out) / "process", process, task, {"solutions": len(solutions), "held_out_losses": losses})
    return process


def draw(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, scorer: Scorer | None) -> list[list[Sample]]:
    """N samples of each row."""
    return to_samples(task, rows, write(model, task, rows, config), scorer)


def greedy(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config) -> dict[str, Any]:
    """The ``summary`` of greedy answers."""
    written = rollout(model, task, [row.prompt_ids for row in rows], **{**config.sampling, "temperature": 0})
    return summary([Spent(x.right, x.tokens) for [x] in to_samples(task, rows, written)])


def with_larger(
    model: PreTrainedModel, larger: PreTrainedModel, task: Task, config: Config, budgets: Sequence[float]
) -> tuple[dict[str, Any], Table]:
    """A larger model's greedy answers, and the majority of its solutions, of which the budgets buy fewer."""
    rows = task.sample(config.problems, "test", torch.Generator().manual_seed(mix_seed(config.seed, 0)))
    times = larger.num_parameters() / model.num_parameters()
    samples = draw(larger, task, rows, config, None)
    costly = [[replace(x, tokens=round(x.tokens * times)) for x in several] for several in samples]
    answers = greedy(larger, task, rows, config)
    figures = {"times": times, "greedy": answers | {"tokens": answers["tokens"] * times}}
    return figures, side_by_side(costly, budgets, False)["majority"]


def choose(
    models: Models,
    task: Task,
    valid_rows: Sequence[Row],
    rows: Sequence[Row],
    kinds: Tables,
    config: Config,
    budgets: Sequence[float],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Table]]:
    """All methods by difficulty; and for searches and for splits into chains, what ``compute_optimal`` returns."""
    elsewhere = replace(config, seed=mix_seed(config.seed, -3))
    tried, _ = spend_all(models, task, valid_rows, write(models.model, task, valid_rows, elsewhere), elsewhere, budgets)
    # Other samples than those that are spent, which would already know how they end.
    scorer = models.any_scorer(task, config.batch_size)
    again = replace(config, seed=mix_seed(config.seed, -5))
    valid, test = (draw(models.model, task, several, again, scorer) for several in (valid_rows, rows))
    found: dict[str, Table] = {}
    chosen = []
    for kind in ("search", "splits"):
        if kind in kinds:
            tables, of_kind = compute_optimal(valid, test, tried[kind], kinds[kind])
            found |= {f"{name}, {kind}": table for name, table in tables.items()}
            chosen += [{"kind": kind, **row} for row in of_kind]
    everything = {name: table for of_kind in kinds.values() for name, table in of_kind.items()}
    return by_difficulty(valid, test, everything | found), chosen, found


def save_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy over tokens, of parallel solutions and search and of chains, and over difficulty at the largest budget."""
    greedy = {"greedy": [[(report["greedy"]["tokens"], report["greedy"]["accuracy"])]]}
    curves = {name: [[(x["tokens"], x["accuracy"]) for x in points]] for name, points in report["curves"].items()}
    chains = {name: seeds for name, seeds in curves.items() if "sequential" in name or "chains" in name or "splits" in name}
    others = {name: seeds for name, seeds in curves.items() if name not in chains}
    panels = [
        plots.Panel("tokens generated per problem", "accuracy", shown | greedy, log=True) for shown in (others, chains) if shown
    ]
    if rows := report.get("by_difficulty"):
        bins = {name: [[(row["difficulty"], row["accuracy"][name][-1]) for row in rows]] for name in rows[0]["accuracy"]}
        label = "difficulty, by the share of right samples"
        panels += [
            plots.Panel(label, "accuracy at the largest budget", {name: bins[name] for name in shown if name in bins})
            for shown in (others, chains)
            if shown
        ]
    plots.panels(path, f"{report['task']}, {report['problems']} test problems", panels)
