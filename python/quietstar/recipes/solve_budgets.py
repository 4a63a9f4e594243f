"""What a budget of generated tokens buys of a problem's solutions, and how often the one that is then chosen is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from quietstar.evaluation.intervals import mean_interval
from quietstar.recipes.common.selectors import ORDERS, Sample, Selector, orders, pass_at, powers_of_two

Chain = Sequence[Sample]  # attempts in order, each of which revises the ones before


@dataclass(frozen=True)
class Spent:
    """What a budget buys on one problem: means over random orders of its chains.

    Attributes:
        right: how often the chosen solution is right.
        tokens: number of generated tokens.
    """

    right: float
    tokens: float


def lengths(most: int, longest: int) -> list[int]:
    """Lengths of chains that contain every split of ``most`` attempts into chains of one length, ``longest`` at most.

    The i-th, counted from 1, has most / i attempts, so there are most / A chains with A attempts or more, and about ``most`` *
    ln(``most``) attempts in all.
    """
    return [min(longest, most // i) for i in range(1, most + 1)]


def split(chains: Sequence[Chain], attempts: int) -> list[Chain]:
    """The first ``attempts`` attempts of each chain; shorter chains are left out."""
    return [chain[:attempts] for chain in chains if len(chain) >= attempts]


def affordable(samples: Sequence[Sample], budget: float) -> Sequence[Sample]:
    """The first samples that fit into a budget of tokens, but at least one."""
    spent = 0
    for count, x in enumerate(samples):
        spent += x.tokens
        if count and spent > budget:
            return samples[:count]
    return samples


def spend(chains: Sequence[Chain], pick: Selector, budget: float) -> Spent:
    """Spend a budget on one chain after the other, each from its start; independent solutions are chains of one attempt."""
    shuffles = orders(chains, ORDERS if len(chains) > 1 else 1)
    bought = [affordable([x for chain in shuffle for x in chain], budget) for shuffle in shuffles]
    return Spent(fmean(pick(x).right for x in bought), fmean(sum(y.tokens for y in x) for x in bought))


def curve(problems: Sequence[Sequence[Chain]], pick: Selector, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """For each budget, the budget and its ``summary``."""
    return [{"budget": budget, **summary([spend(chains, pick, budget) for chains in problems])} for budget in budgets]


def summary(spent: Sequence[Spent]) -> dict[str, Any]:
    """accuracy with its interval over problems (low, high), and tokens, the mean number used."""
    accuracy, low, high = mean_interval([x.right for x in spent])
    return {"accuracy": accuracy, "low": low, "high": high, "tokens": fmean(x.tokens for x in spent)}


def oracle(problems: Sequence[Sequence[Sample]], unit: float) -> list[dict[str, Any]]:
    """How often any of k solutions is right, which a perfect verifier would reach; an unbiased estimate for each k.

    Args:
        unit: tokens per solution.
    """
    return [
        {"budget": k * unit, **summary([Spent(pass_at(k, [x.right for x in samples]), k * unit) for samples in problems])}
        for k in powers_of_two(len(problems[0]))
    ]
