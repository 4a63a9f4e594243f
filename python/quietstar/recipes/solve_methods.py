"""The ways to spend a budget of tokens: solutions side by side, search over steps, and chains of revisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from quietstar.arguments.fields import check, check_at_least
from quietstar.config import option
from quietstar.recipes.common.sampling import Completion, Sampling, rollout
from quietstar.recipes.common.selectors import (
    Sample,
    Selector,
    best,
    hierarchical,
    likeliest,
    majority,
    powers_of_two,
    weighted,
)
from quietstar.recipes.common.solutions import Scorer, to_samples
from quietstar.recipes.solve_budgets import Chains, ChainSelector, Spent, Table, alone, from_all, lengths, measure, split
from quietstar.recipes.solve_revisions import revise
from quietstar.recipes.solve_search import search
from quietstar.recipes.solve_values import value_scorer, values
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed

BEST, WEIGHTED = "best of k, process verifier", "weighted vote, process verifier"
BEAM, LOOKAHEAD = "beam search", "look-ahead search"


@dataclass
class Spending(Sampling):
    """How much is spent on a problem, in which ways.

    Raises:
        ValueError: a value outside its range, by name.
    """

    samples: int = option(16, "N, solutions of each problem")
    attempts: int = option(8, "attempts in a chain of revisions, rounded down to a power of 2; 0 for no chains")
    beam_width: int = option(4, "M of a search: of N candidates for a step, N / M go on; a power of 2")
    lookahead: int = option(1, "steps that look-ahead search goes on before it values a step; 0 leaves it out")
    valid_problems: int = option(0, "validation problems, to choose ways of spending by difficulty; 0 leaves that out")

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        check_at_least("solve", self, 1, ("samples", "beam_width"))
        check_at_least("solve", self, 0, ("attempts", "lookahead", "valid_problems"))
        check("solve", self, "beam_width", self.beam_width.bit_count() == 1, "a power of 2")
        check("solve", self, "temperature", self.temperature > 0, "above 0, or all samples are one")


@dataclass(frozen=True)
class Models:
    """Who writes and who judges.

    Attributes:
        scorer: of solutions.
        process: a process verifier.
        reviser: writes chains.
        judge: of the attempts in these, given the earlier ones; without one they are scored as solutions are.
    """

    model: PreTrainedModel
    scorer: Scorer | None
    process: PreTrainedModel | None
    reviser: PreTrainedModel
    judge: PreTrainedModel | None

    def any_scorer(self, task: Task, batch_size: int) -> Scorer | None:
        """The scorer of solutions or, without one, the process verifier's."""
        return self.scorer or (value_scorer(self.process, task, batch_size) if self.process else None)


Tables = dict[str, dict[str, Table]]  # by the kind of method: "parallel", "search", "sequential", and "splits" into chains


def spend_all(
    models: Models,
    task: Task,
    rows: Sequence[Row],
    written: Sequence[Sequence[Completion]],
    config: Spending,
    budgets: Sequence[float],
) -> tuple[Tables, Chains]:
    """Solve these rows in all ways that the models allow.

    Args:
        written: N solutions of each row, for the methods that only choose.
        budgets: for about 1, 2, 4, ... N solutions.

    Returns:
        What each budget buys, and the chains.
    """
    samples = to_samples(task, rows, written, models.scorer)
    tables = {"parallel": side_by_side(samples, budgets, models.scorer is not None)}
    if models.process:
        tables["search"] = searched(models.model, models.process, task, rows, written, config, budgets)
    if not config.attempts:
        return tables, []
    until = chain_lengths(config)
    scorer = models.any_scorer(task, config.batch_size)
    chains = revise(models.reviser, task, rows, until, config, scorer, models.judge)
    scored = bool(scorer or models.judge)
    picks: dict[str, ChainSelector] = {"majority": from_all(majority), "last": lambda some: some[-1][-1]}
    picks |= {"verifier": hierarchical} if scored else {}
    longest = [split(problem, until[0]) for problem in chains]
    tables["sequential"] = {f"sequential, {name}": measure(longest, pick, budgets) for name, pick in picks.items()}
    if config.valid_problems:
        pick = picks.get("verifier", picks["majority"])
        tables["splits"] = {
            f"chains of {length}": measure([split(problem, length) for problem in chains], pick, budgets)
            for length in powers_of_two(until[0])
        }
    return tables, chains


def write(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Spending) -> list[list[Completion]]:
    """N solutions of each row."""
    prompts = [row.prompt_ids for row in rows]
    return rollout(model, task, prompts, config.samples, seed=mix_seed(config.seed, 1), **config.sampling)


def chain_lengths(config: Spending) -> list[int]:
    """Lengths of a problem's chains: all as long as allowed or, to choose among splits, those of every split."""
    most, longest = (powers_of_two(x)[-1] for x in (config.samples, min(config.samples, config.attempts)))
    return lengths(most, longest) if config.valid_problems else [longest] * (most // longest)


def side_by_side(samples: Sequence[Sequence[Sample]], budgets: Sequence[float], scored: bool) -> dict[str, Table]:
    """Independent solutions, by the selectors that can choose from them."""
    problems = [alone(x) for x in samples]
    return {name: measure(problems, from_all(pick), budgets) for name, pick in selectors(scored).items()}


def selectors(scored: bool) -> dict[str, Selector]:
    """Selectors by the names that reports give them."""
    plain: dict[str, Selector] = {"one sample": lambda samples: samples[0], "majority": majority, "likeliest": likeliest}
    return plain | {"best of k": best, "weighted vote": weighted} if scored else plain


def searched(
    model: PreTrainedModel,
    process: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    written: Sequence[Sequence[Completion]],
    config: Spending,
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
