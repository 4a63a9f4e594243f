"""What more tokens at test time buy: votes, a verifier's choice, search over steps, and attempts that revise each other.

In parallel: N solutions of each problem, from which a selector takes one. Step by step: N candidates, of which a process
verifier keeps the best. In sequence: chains of attempts, each of which sees up to four earlier ones. A budget is a number of
generated tokens per problem, and each method gets as many whole solutions as come nearest to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quietstar.config import option
from quietstar.run.batches import mix_seed
from quietstar.run.lock import alone_in_out
from quietstar_kernels.checks import check, check_at_least, check_types
from quietstar_recipes.common import plots, selectors
from quietstar_recipes.common.sampling import Completion, Sampling, Solutions, rollout
from quietstar_recipes.common.saving import save_model, write_json, write_lines
from quietstar_recipes.common.selectors import Sample, Selector, best, majority, powers_of_two, weighted
from quietstar_recipes.common.solutions import Scorer, to_samples
from quietstar_recipes.common.training import SFTConfig
from quietstar_recipes.solve.budgets import (
    BINS,
    Chains,
    ChainSelector,
    Spent,
    Table,
    alone,
    compute_optimal,
    curve,
    from_all,
    lengths,
    measure,
    oracle,
    split,
    summary,
)
from quietstar_recipes.solve.revisions import revise, train_chain_verifier, train_reviser
from quietstar_recipes.solve.search import search
from quietstar_recipes.solve.values import roll_out, train_values, value_scorer, values
from quietstar_recipes.tasks import Row, Task

BEST, WEIGHTED = "best of k, process verifier", "weighted vote, process verifier"
BEAM, LOOKAHEAD = "beam search", "look-ahead search"
LARGER = "larger model, majority"


@dataclass
class Config(SFTConfig, Sampling):
    """How much is spent on which problems; the learning rate and batches are those of the reviser and of all verifiers."""

    out: str = option("runs/solve", "folder for samples, figures and the plot")
    problems: int = option(400, "test problems")
    samples: int = option(16, "N, solutions of each problem")
    attempts: int = option(8, "attempts in a chain of revisions, rounded down to a power of 2; 0 for no chains")
    beam_width: int = option(4, "M of a search: of N candidates for a step, N / M go on; a power of 2")
    lookahead: int = option(1, "steps that look-ahead search goes on before it values a step; 0 leaves it out")
    valid_problems: int = option(0, "validation problems, to choose ways of spending by difficulty; 0 leaves that out")
    revise_steps: int = option(0, "training steps on revisions of the model's own attempts, before it revises")
    revise_problems: int = option(2000, "training problems for those steps, and for the verifier of chains")
    revise_samples: int = option(64, "solutions of each of them to learn revisions from")
    judge_steps: int = option(
        0, "training steps of a verifier of the chains' attempts, which sees the earlier ones; 0 scores them as solutions"
    )
    process_steps: int = option(0, "training steps of a process verifier, which leads a search; 0 for none")
    process_problems: int = option(1000, "training problems for those steps")
    process_samples: int = option(16, "solutions of each of them")
    rollouts: int = option(16, "rollouts from each of their steps, which give its value")

    def __post_init__(self) -> None:
        check_types("solve", self)
        for part in (SFTConfig, Sampling):
            part.__post_init__(self)
        several = ("revise_problems", "revise_samples", "process_problems", "process_samples", "rollouts")
        check_at_least("solve", self, 1, ("samples", "beam_width", "problems", *several))
        none_allowed = ("attempts", "lookahead", "valid_problems", "revise_steps", "judge_steps", "process_steps")
        check_at_least("solve", self, 0, none_allowed)
        check("solve", self, "beam_width", self.beam_width.bit_count() == 1, "a power of 2")
        check("solve", self, "temperature", self.temperature > 0, "above 0, or all samples are one")


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
        validation problems also chosen, the rows of ``compute_optimal`` for each kind of method.

    Raises:
        ValueError: no solution has an answer that can be read, or there are too few validation problems.
    """
    # 1. N solutions of each problem, whose mean length is the unit of the budgets.
    rows = task.sample(config.problems, "test", torch.Generator().manual_seed(mix_seed(config.seed, 0)))
    valid_rows = validation_rows(task, config)
    written = write(model, task, rows, config)
    samples = to_samples(task, rows, written, scorer)
    if not any(x.answer is not None for several in samples for x in several):
        raise ValueError(f"solve: no solution of {len(rows)} problems has an answer that can be read")
    out = Path(config.out)
    write_lines(out / "samples.jsonl", [[asdict(x) for x in several] for several in samples])
    unit = sum(x.tokens for several in samples for x in several) / (len(rows) * config.samples)
    budgets = [k * unit for k in powers_of_two(config.samples)]
    # 2. The other models, and what each way of spending the budgets reaches.
    methods = make_methods(model, task, config, scorer, process)
    kinds, chains = methods.spend(rows, written, config, budgets)
    if chains:
        write_lines(out / "chains.jsonl", [[[asdict(x) for x in chain] for chain in problem] for problem in chains])
    tables = {name: table for of_kind in kinds.values() for name, table in of_kind.items()} | {"oracle": oracle(samples, unit)}
    # 3. The report, with a larger model and with ways chosen by difficulty where these are wanted.
    report: dict[str, Any] = {"task": task.name, "problems": len(rows), "config": asdict(config)}
    report["greedy"] = summary(greedy(model, task, rows, config))
    if larger:
        report["larger"], tables[LARGER] = with_larger(model, *larger, config, budgets)
    if valid_rows:
        report["chosen"], chosen = methods.choose(valid_rows, rows, kinds, config, budgets)
        tables |= chosen
    report["curves"] = {name: curve(table, budgets) for name, table in tables.items()}
    write_json(out / "test_time.json", report)
    plot(report, out / "test_time.png")
    return report


def validation_rows(task: Task, config: Config) -> list[Row]:
    """Validation problems, if ways of spending are to be chosen by difficulty; otherwise none."""
    if not config.valid_problems:
        return []
    rows = task.sample(config.valid_problems, "valid", torch.Generator().manual_seed(mix_seed(config.seed, -4)))
    if len(rows) < BINS:
        wanted = f"valid_problems={config.valid_problems} must be {BINS} or more, and the data must have as many"
        raise ValueError(f"solve: {wanted}: got {len(rows)}")
    return rows


def make_methods(
    model: PreTrainedModel, task: Task, config: Config, scorer: Scorer | None, process: PreTrainedModel | None
) -> Methods:
    """Train the models that ``config`` asks for; a process verifier is saved in the folder process of ``config.out``."""
    if config.process_steps and process is None:
        rows = task.sample(config.process_problems, "train", torch.Generator().manual_seed(mix_seed(config.seed, -7)))
        solutions = roll_out(model, task, rows, config.process_samples, config.rollouts, config)
        process, losses = train_values(model, task, solutions, config.process_steps, config, config.seed)
        save_model(Path(config.out) / "process", process, task, {"solutions": len(solutions), "held_out_losses": losses})
    reviser, judge = model, None
    if config.attempts and (config.revise_steps or config.judge_steps):
        rows = task.sample(config.revise_problems, "train", torch.Generator().manual_seed(mix_seed(config.seed, -1)))
        if config.revise_steps:
            reviser = train_reviser(model, task, rows, config.revise_samples, config.revise_steps, config, config)
        if config.judge_steps:
            attempts = chain_lengths(config)[0]
            judge = train_chain_verifier(reviser, model, task, rows, attempts, config.judge_steps, config, config)
    return Methods(model, task, scorer, process, reviser, judge)


def draw(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, scorer: Scorer | None) -> list[list[Sample]]:
    """N samples of each row."""
    return to_samples(task, rows, write(model, task, rows, config), scorer)


def greedy(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, times: float = 1) -> list[Spent]:
    """Greedy answers, a token of which counts ``times``."""
    written = rollout(model, task, [row.prompt_ids for row in rows], **{**config.sampling, "temperature": 0})
    return [Spent(x.right, times * x.tokens) for [x] in to_samples(task, rows, written)]


def with_larger(
    model: PreTrainedModel, larger: PreTrainedModel, task: Task, config: Config, budgets: Sequence[float]
) -> tuple[dict[str, Any], Table]:
    """A larger model's greedy answers, and the majority of its solutions, of which the budgets buy fewer."""
    rows = task.sample(config.problems, "test", torch.Generator().manual_seed(mix_seed(config.seed, 0)))
    times = larger.num_parameters() / model.num_parameters()
    samples = draw(larger, task, rows, config, None)
    costly = [[replace(x, tokens=round(x.tokens * times)) for x in several] for several in samples]
    figures = {"times": times, "greedy": summary(greedy(larger, task, rows, config, times))}
    return figures, side_by_side(costly, budgets, False)["majority"]


def write(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config) -> list[list[Completion]]:
    """N solutions of each row."""
    prompts = [row.prompt_ids for row in rows]
    return rollout(model, task, prompts, config.samples, seed=mix_seed(config.seed, 1), **config.sampling)


def chain_lengths(config: Config) -> list[int]:
    """Lengths of a problem's chains: all as long as allowed or, to choose among splits, those of every split."""
    most, longest = (powers_of_two(x)[-1] for x in (config.samples, min(config.samples, config.attempts)))
    return lengths(most, longest) if config.valid_problems else [longest] * (most // longest)


def side_by_side(samples: Sequence[Sequence[Sample]], budgets: Sequence[float], scored: bool) -> dict[str, Table]:
    """Independent solutions, by the selectors that can choose from them."""
    picks: dict[str, Selector] = {"one sample": lambda several: several[0], "majority": majority}
    picks["likeliest"] = selectors.likeliest
    if scored:
        picks |= {"best of k": best, "weighted vote": weighted}
    problems = [alone(x) for x in samples]
    return {name: measure(problems, from_all(pick), budgets) for name, pick in picks.items()}


def searched(
    model: PreTrainedModel,
    process: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    written: Solutions,
    config: Config,
    budgets: Sequence[float],
) -> dict[str, Table]:
    """A process verifier's choice among these solutions, and the searches that it leads."""
    scored = [alone(x) for x in to_samples(task, rows, written, value_scorer(process, task, config.batch_size))]
    tables = {name: measure(scored, from_all(pick), budgets) for name, pick in ((BEST, best), (WEIGHTED, weighted))}
    value = partial(values, process, task, batch_size=config.batch_size)
    for name, lookahead in {BEAM: 0, LOOKAHEAD: config.lookahead}.items():
        if name == BEAM or lookahead:
            # Each step ahead costs as much as a step, so that there are fewer candidates, as in the paper.
            sizes = [powers_of_two(max(1, k // (1 + lookahead)))[-1] for k in powers_of_two(config.samples)]
            runs = {
                N: search(model, task, rows, value, N, min(N, config.beam_width), config, lookahead if N > 1 else 0)
                for N in set(sizes)
            }
            tables[name] = [[Spent(weighted(x.samples).right, x.tokens) for x in runs[N]] for N in sizes]
    return tables


Tables = dict[str, dict[str, Table]]  # by the kind of method: "parallel", "search", "sequential", and "splits" into chains


@dataclass(frozen=True)
class Methods:
    """All ways to solve problems that the models allow.

    Attributes:
        scorer: of solutions.
        process: a process verifier.
        reviser: writes chains.
        judge: of the attempts in these, given the earlier ones; without one they are scored as solutions are.
    """

    model: PreTrainedModel
    task: Task
    scorer: Scorer | None
    process: PreTrainedModel | None
    reviser: PreTrainedModel
    judge: PreTrainedModel | None

    def any_scorer(self, config: Config) -> Scorer | None:
        """The scorer of solutions or, without one, the process verifier's."""
        return self.scorer or (value_scorer(self.process, self.task, config.batch_size) if self.process else None)

    def spend(self, rows: Sequence[Row], written: Solutions, config: Config, budgets: Sequence[float]) -> tuple[Tables, Chains]:
        """Solve these rows in all ways; returns what each budget buys, and the chains.

        Args:
            written: N solutions of each row, for the methods that only choose.
            budgets: for about 1, 2, 4, ... N solutions.
        """
        samples = to_samples(self.task, rows, written, self.scorer)
        tables = {"parallel": side_by_side(samples, budgets, self.scorer is not None)}
        if self.process:
            tables["search"] = searched(self.model, self.process, self.task, rows, written, config, budgets)
        if not config.attempts:
            return tables, []
        until, scorer = chain_lengths(config), self.any_scorer(config)
        chains = revise(self.reviser, self.task, rows, until, config, scorer, self.judge)
        picks: dict[str, ChainSelector] = {"majority": from_all(majority), "last": lambda some: some[-1][-1]}
        picks |= {"verifier": selectors.hierarchical} if scorer or self.judge else {}
        longest = [split(problem, until[0]) for problem in chains]
        tables["sequential"] = {f"sequential, {name}": measure(longest, pick, budgets) for name, pick in picks.items()}
        if config.valid_problems:
            pick = picks.get("verifier", picks["majority"])
            tables["splits"] = {
                f"chains of {length}": measure([split(problem, length) for problem in chains], pick, budgets)
                for length in powers_of_two(until[0])
            }
        return tables, chains

    def choose(
        self, valid_rows: Sequence[Row], rows: Sequence[Row], kinds: Tables, config: Config, budgets: Sequence[float]
    ) -> tuple[list[dict[str, Any]], dict[str, Table]]:
        """For searches and for splits into chains, what ``compute_optimal`` returns."""
        elsewhere = replace(config, seed=mix_seed(config.seed, -3))
        tried, _ = self.spend(valid_rows, write(self.model, self.task, valid_rows, elsewhere), elsewhere, budgets)
        # Other samples than those that are spent, which would already know how they end.
        again, scorer = replace(config, seed=mix_seed(config.seed, -5)), self.any_scorer(config)
        valid, test = (draw(self.model, self.task, several, again, scorer) for several in (valid_rows, rows))
        found: dict[str, Table] = {}
        chosen = []
        for kind in ("search", "splits"):
            if kind in kinds:
                tables, of_kind = compute_optimal(valid, test, tried[kind], kinds[kind])
                found |= {f"{name}, {kind}": table for name, table in tables.items()}
                chosen += [{"kind": kind, **row} for row in of_kind]
        return chosen, found


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy over tokens, of parallel solutions and search, and of chains."""
    greedy = {"greedy": [[(report["greedy"]["tokens"], report["greedy"]["accuracy"])]]}
    curves = {name: [[(x["tokens"], x["accuracy"]) for x in points]] for name, points in report["curves"].items()}
    chains = {name: seeds for name, seeds in curves.items() if "sequential" in name or "chains" in name or "splits" in name}
    others = {name: seeds for name, seeds in curves.items() if name not in chains}
    label = "tokens generated per problem"
    panels = [plots.Panel(label, "accuracy", shown | greedy, log=True) for shown in (others, chains) if shown]
    plots.panels(path, f"{report['task']}, {report['problems']} test problems", panels)
