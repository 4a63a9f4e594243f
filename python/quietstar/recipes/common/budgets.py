"""What a budget of generated tokens buys of a problem's solutions, and how often the one that is then chosen is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from quietstar.evaluation.intervals import mean_interval
from quietstar.recipes.common.selectors import ORDERS, Sample, Selector, orders, pass_at

Chain = Sequence[Sample]  # attempts that revise each other, in their order


@dataclass(frozen=True)
class Spent:
    """On one problem, means over random orders of its chains.

    Attributes:
        right: how often what was chosen is right.
        tokens: how many were generated.
    """

    right: float
    tokens: float


def powers(most: int) -> list[int]:
    """The powers of 2 from 1 to ``most``; none for 0."""
    return [2**i for i in range(most.bit_length())]


def lengths(most: int, longest: int) -> list[int]:
    """Of the chains that hold every split of ``most`` attempts into chains of one length, which is ``longest`` at most.

    The i-th from 1 has most / i attempts, so of length A there are most / A, and ``most`` * ln(``most``) attempts in all.
    """
    return [min(longest, most // i) for i in range(1, most + 1)]


def split(chains: Sequence[Chain], attempts: int) -> list[Chain]:
    """The chains of so many attempts: what comes after is cut off, and shorter ones are left out."""
    return [chain[:attempts] for chain in chains if len(chain) >= attempts]


def affordable(samples: Sequence[Sample], budget: float) -> Sequence[Sample]:
    """The first ones that fit into a budget of tokens, but one at least."""
    spent = 0
    for count, x in enumerate(samples):
        spent += x.tokens
        if count and spent > budget:
            return samples[:count]
    return samples


def spend(chains: Sequence[Chain], pick: Selector, budget: float) -> Spent:
    """On one chain after the other, each from its beginning; independent solutions are chains of one attempt."""
    several = orders(chains, ORDERS if len(chains) > 1 else 1)
    bought = [affordable([x for chain in ordered for x in chain], budget) for ordered in several]
    return Spent(fmean(pick(x).right for x in bought), fmean(sum(y.tokens for y in x) for x in bought))


def curve(problems: Sequence[Sequence[Chain]], pick: Selector, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """``summary`` of each budget, with the budget."""
    return [{"budget": budget, **summary([spend(chains, pick, budget) for chains in problems])} for budget in budgets]


def summary(spent: Sequence[Spent]) -> dict[str, Any]:
    """accuracy, low and high, its interval over problems, and tokens, the mean of what was used."""
    accuracy, low, high = mean_interval([x.right for x in spent])
    return {"accuracy": accuracy, "low": low, "high": high, "tokens": fmean(x.tokens for x in spent)}


def oracle(problems: Sequence[Sequence[Sample]], unit: float) -> list[dict[str, Any]]:
    """Whether any of k is right, what a perfect verifier would reach; without bias for any k. ``unit`` is tokens a solution."""
    return [
        {"budget": k * unit, **summary([Spent(pass_at(k, [x.right for x in several]), k * unit) for several in problems])}
        for k in powers(len(problems[0]))
    ]
