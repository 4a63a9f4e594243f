"""What a budget of generated tokens buys of a problem's solutions, and how best to spend it by the problem's difficulty.

Compute-optimal scaling of arXiv 2408.03314: the strategy for each difficulty, such as a search or a split between attempts that
revise each other and parallel chains, is chosen on validation problems.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

from quietstar.evaluation.intervals import mean_interval
from quietstar_recipes.common.selectors import ORDERS, Sample, Selector, majority, orders, pass_at, powers_of_two

Chain = Sequence[Sample]  # attempts in order, each of which revises the ones before
Chains = Sequence[Sequence[Chain]]  # the chains of each problem
ChainSelector = Callable[[Sequence[Chain]], Sample]


@dataclass(frozen=True)
class Spent:
    """What a budget buys on one problem: means over random orders of its chains."""

    right: float  # how often the chosen solution is right
    tokens: float  # number of generated tokens


Table = Sequence[Sequence[Spent]]  # for each budget, what it buys on each problem


def lengths(most: int, longest: int) -> list[int]:
    """Lengths of chains that contain every split of ``most`` attempts into chains of one length, ``longest`` at most.

    The i-th, counted from 1, has most / i attempts, so there are most / A chains with A attempts or more, and about ``most`` *
    ln(``most``) attempts in all.
    """
    return [min(longest, most // i) for i in range(1, most + 1)]


def split(chains: Sequence[Chain], attempts: int) -> list[Chain]:
    """The first ``attempts`` attempts of each chain; shorter chains are left out."""
    return [chain[:attempts] for chain in chains if len(chain) >= attempts]


def alone(samples: Sequence[Sample]) -> list[Chain]:
    """Independent solutions, each a chain of its own."""
    return [[x] for x in samples]


def from_all(pick: Selector) -> ChainSelector:
    """Picks from the attempts of all chains at once."""
    return lambda chains: pick([x for chain in chains for x in chain])


def affordable(chains: Sequence[Chain], budget: float) -> list[Chain]:
    """What a budget of tokens buys, one chain after the other, each from its start: as many attempts as come nearest to it, but
    at least one. If only whole ones counted, a token too many in one of 16 would cost parallel solutions the last of them."""
    bought: list[list[Sample]] = []
    spent = 0
    for chain in chains:
        for number, x in enumerate(chain):
            spent += x.tokens
            if bought and spent - x.tokens / 2 > budget:
                return list(bought)
            if number == 0:
                bought.append([])
            bought[-1].append(x)
    return list(bought)


def spend(chains: Sequence[Chain], pick: ChainSelector, budget: float) -> Spent:
    """Spend a budget on one chain after the other."""
    shuffles = orders(chains, ORDERS if len(chains) > 1 else 1)
    bought = [affordable(shuffle, budget) for shuffle in shuffles]
    tokens = fmean(sum(x.tokens for chain in some for x in chain) for some in bought)
    return Spent(fmean(pick(some).right for some in bought), tokens)


def measure(problems: Chains, pick: ChainSelector, budgets: Sequence[float]) -> Table:
    """``spend`` for each budget and each problem."""
    return [[spend(chains, pick, budget) for chains in problems] for budget in budgets]


def oracle(problems: Sequence[Sequence[Sample]], unit: float) -> Table:
    """How often any of k = 1, 2, 4, ... solutions is right, which a perfect verifier would reach; an unbiased estimate.

    Args:
        unit: tokens per solution.
    """
    right = [[x.right for x in samples] for samples in problems]
    return [[Spent(pass_at(k, x), k * unit) for x in right] for k in powers_of_two(len(right[0]))]


def curve(table: Table, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """For each budget, the budget and its ``summary``."""
    return [{"budget": budget, **summary(spent)} for budget, spent in zip(budgets, table, strict=True)]


def summary(spent: Sequence[Spent]) -> dict[str, Any]:
    """accuracy with its interval over problems (low, high), and tokens, the mean number used."""
    accuracy, low, high = mean_interval([x.right for x in spent])
    return {"accuracy": accuracy, "low": low, "high": high, "tokens": fmean(x.tokens for x in spent)}


BINS = 5  # of difficulty, with equally many validation problems in each unless some are equally difficult
ONE, PREDICTED, MEASURED = "one for all", "compute-optimal", "compute-optimal, oracle bins"
Samples = Sequence[Sequence[Sample]]  # of each problem, only to measure its difficulty: spent ones would know how they end


def predicted(samples: Sequence[Sample]) -> float:
    """A problem's difficulty, estimated without its answer.

    Minus the mean score or, without a verifier, minus the share of the most frequent answer.
    """
    scores = [x.score for x in samples if x.score is not None]
    if len(scores) == len(samples):
        return -fmean(scores)
    answer = majority(samples).answer
    return 0.0 if answer is None else -fmean(x.answer == answer for x in samples)


def measured(samples: Sequence[Sample]) -> float:
    """A problem's difficulty given its answer: minus the share of right samples."""
    return -fmean(x.right for x in samples)


DIFFICULTIES: dict[str, Callable[[Sequence[Sample]], float]] = {ONE: lambda _: 0.0, PREDICTED: predicted, MEASURED: measured}


def compute_optimal(
    valid: Samples, test: Samples, tried: Mapping[str, Table], tested: Mapping[str, Table]
) -> tuple[dict[str, Table], list[dict[str, Any]]]:
    """What choosing the strategy by difficulty reaches on test problems; bin edges and choices come from validation problems.

    Args:
        valid, test: samples of these problems.
        tried, tested: what each strategy reaches on validation and on test problems, with the same budgets.

    Returns:
        Tables like those given: with one strategy for all problems, by predicted and by measured difficulty. And for the
        largest budget one row per bin that has test problems, the easiest first: bins (the table's name), difficulty from 1,
        problems, chosen (a strategy), and accuracy for each strategy.
    """
    found: dict[str, Table] = {}
    rows = []
    for name, difficulty in DIFFICULTIES.items():
        values = [difficulty(samples) for samples in valid]
        edges = quantiles(values, n=BINS, method="inclusive")  # bins from 0, the easiest
        valid_bins, test_bins = [bisect(edges, x) for x in values], [bisect(edges, difficulty(samples)) for samples in test]
        table, chosen = [], []
        for number in range(len(next(iter(tried.values())))):
            chosen = choose({strategy: x[number] for strategy, x in tried.items()}, valid_bins)
            table.append([tested[chosen[x]][number][problem] for problem, x in enumerate(test_bins)])
        found[name] = table
        for x in sorted(set(test_bins)) if name != ONE else ():
            own = [problem for problem, other in enumerate(test_bins) if other == x]
            accuracy = {strategy: fmean(reached[-1][i].right for i in own) for strategy, reached in tested.items()}
            row = {"bins": name, "difficulty": x + 1, "problems": len(own), "chosen": chosen[x]}
            rows.append({**row, "accuracy": accuracy})
    return found, rows


def choose(spent: Mapping[str, Sequence[Spent]], problem_bins: Sequence[int]) -> list[str]:
    """Each bin's best strategy, the first one in a tie; a bin without problems gets the one that is best overall."""
    found = []
    for x in range(BINS):
        problems = [i for i, own in enumerate(problem_bins) if own == x] or range(len(problem_bins))
        means = {strategy: fmean(several[i].right for i in problems) for strategy, several in spent.items()}
        found.append(max(means, key=means.__getitem__))
    return found
