"""What a budget of generated tokens buys of a problem's solutions, and how often the one that is then chosen is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from quietstar.evaluation.intervals import mean_interval
from quietstar.recipes.common.selectors import ORDERS, Sample, Selector, orders, pass_at, powers_of_two

Chain = Sequence[Sample]  # attempts in order, each of which revises the ones before
Chains = Sequence[Sequence[Chain]]  # the chains of each problem
ChainSelector = Callable[[Sequence[Chain]], Sample]


@dataclass(frozen=True)
class Spent:
    """What a budget buys on one problem: means over random orders of its chains.

    Attributes:
        right: how often the chosen solution is right.
        tokens: number of generated tokens.
    """

    right: float
    tokens: float


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
    """What fits into a budget of tokens, one chain after the other, each from its start, but at least one attempt."""
    bought: list[list[Sample]] = []
    spent = 0
    for chain in chains:
        for number, x in enumerate(chain):
            spent += x.tokens
            if bought and spent > budget:
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
