"""How a budget is best split into attempts that revise each other and chains side by side, by how hard a problem is.

Compute-optimal scaling of arXiv 2408.03314: the split of each difficulty is chosen on validation problems.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

from quietstar.recipes.common.budgets import Chain, Spent, powers, spend, split, summary
from quietstar.recipes.common.selectors import Sample, Selector, majority

BINS = 5  # of difficulty, equally many validation problems in each
ONE, PREDICTED, MEASURED = "one split for all", "compute-optimal", "compute-optimal, oracle bins"


@dataclass(frozen=True)
class Drawn:
    """Solutions of some problems.

    Attributes:
        samples: of each problem, independent ones, which tell how hard it is and nothing else.
        chains: of each problem, as long as ``budgets.lengths`` says; budgets are spent on these alone, since a difficulty
            measured on what it then decides about would know how that ends.
    """

    samples: Sequence[Sequence[Sample]]
    chains: Sequence[Sequence[Chain]]


def predicted(samples: Sequence[Sample]) -> float:
    """A problem's difficulty without its answer: a low mean score, or without a verifier few samples with one answer."""
    scores = [x.score for x in samples if x.score is not None]
    if len(scores) == len(samples):
        return -fmean(scores)
    answer = majority(samples).answer
    return 0.0 if answer is None else -fmean(x.answer == answer for x in samples)


def measured(samples: Sequence[Sample]) -> float:
    """A problem's difficulty by its answer: a low share of right samples."""
    return -fmean(x.right for x in samples)


DIFFICULTIES: dict[str, Callable[[Sequence[Sample]], float]] = {ONE: lambda _: 0.0, PREDICTED: predicted, MEASURED: measured}


def compute_optimal(
    valid: Drawn, test: Drawn, pick: Selector, budgets: Sequence[float]
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """What choosing a split by difficulty reaches on test problems, with the bins' edges and choices of validation problems.

    Args:
        pick: chooses among all attempts that a budget bought.
        budgets: in tokens; the i-th from 0 is for about 2**i attempts.

    Returns:
        Curves as those of ``budgets.curve``: with one split for all, by predicted and by measured difficulty. And of the
        largest budget a row for each bin with test problems, the easiest first: bins (the curve's name), difficulty from 1,
        problems, chosen (attempts in a chain) and accuracy, of each number of attempts in a chain.
    """
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in DIFFICULTIES}
    bins = {name: binned(valid, test, difficulty) for name, difficulty in DIFFICULTIES.items()}
    longest = len(valid.chains[0][0])
    for i, budget in enumerate(budgets):
        splits = powers(min(longest, 2**i))
        tried, tested = (spend_all(drawn, splits, pick, budget) for drawn in (valid, test))
        chosen = {name: choose(tried, places) for name, (places, _) in bins.items()}
        for name, (_, places) in bins.items():
            spent = [tested[chosen[name][x]][problem] for problem, x in enumerate(places)]
            curves[name].append({"budget": budget, **summary(spent)})
    rows = []
    for name in (PREDICTED, MEASURED):
        places = bins[name][1]
        for x in sorted(set(places)):
            accuracy = {str(A): mean_of(several, places, x) for A, several in zip(splits, tested, strict=True)}
            row = {"bins": name, "difficulty": x + 1, "problems": places.count(x), "chosen": splits[chosen[name][x]]}
            rows.append({**row, "accuracy": accuracy})
    return curves, rows


def spend_all(drawn: Drawn, splits: Sequence[int], pick: Selector, budget: float) -> list[list[Spent]]:
    """Of each split and each problem."""
    return [[spend(split(chains, attempts), pick, budget) for chains in drawn.chains] for attempts in splits]


def binned(valid: Drawn, test: Drawn, difficulty: Callable[[Sequence[Sample]], float]) -> tuple[list[int], list[int]]:
    """Bins of the validation and of the test problems, from 0, the easiest; without ties of as many validation problems."""
    values, others = ([difficulty(samples) for samples in drawn.samples] for drawn in (valid, test))
    edges = quantiles(values, n=BINS, method="inclusive")
    return [bisect(edges, x) for x in values], [bisect(edges, x) for x in others]


def choose(spent: Sequence[Sequence[Spent]], places: Sequence[int]) -> list[int]:
    """The place of each bin's best split, the first of equals; a bin without a problem has what is best for all."""
    everywhere = [fmean(x.right for x in several) for several in spent]
    found = []
    for x in range(BINS):
        means = [mean_of(several, places, x) for several in spent] if x in places else everywhere
        found.append(means.index(max(means)))
    return found


def mean_of(spent: Sequence[Spent], places: Sequence[int], x: int) -> float:
    """The accuracy in one bin."""
    return fmean(one.right for one, place in zip(spent, places, strict=True) if place == x)
