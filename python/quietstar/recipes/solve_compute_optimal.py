"""How best to split a budget between attempts that revise each other and parallel chains, depending on a problem's difficulty.

Compute-optimal scaling of arXiv 2408.03314: the split for each difficulty is chosen on validation problems.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

from quietstar.recipes.common.selectors import Sample, Selector, majority, powers_of_two
from quietstar.recipes.solve_budgets import Chain, Spent, spend, split, summary

BINS = 5  # of difficulty, with equally many validation problems in each
ONE, PREDICTED, MEASURED = "one split for all", "compute-optimal", "compute-optimal, oracle bins"


@dataclass(frozen=True)
class Drawn:
    """Solutions of some problems.

    Attributes:
        samples: independent solutions of each problem, used only to measure its difficulty.
        chains: of each problem, with the lengths of ``solve_budgets.lengths``. Budgets are spent only on these: a difficulty
            measured on the same attempts would already know how they end.
    """

    samples: Sequence[Sequence[Sample]]
    chains: Sequence[Sequence[Chain]]


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
    valid: Drawn, test: Drawn, pick: Selector, budgets: Sequence[float]
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """What choosing the split by difficulty reaches on test problems; bin edges and choices come from validation problems.

    Args:
        pick: chooses among all attempts that a budget bought.
        budgets: in tokens; the i-th, counted from 0, is for about 2**i attempts.

    Returns:
        Curves like those of ``solve_budgets.curve``: with one split for all problems, by predicted and by measured difficulty.
        And for the largest budget one row per bin that has test problems, the easiest first: bins (the curve's name),
        difficulty from 1, problems, chosen (attempts per chain), and accuracy for each number of attempts per chain.
    """
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in DIFFICULTIES}
    bins = {name: binned(valid, test, difficulty) for name, difficulty in DIFFICULTIES.items()}
    longest = len(valid.chains[0][0])
    for i, budget in enumerate(budgets):
        splits = powers_of_two(min(longest, 2**i))
        tried, tested = (spend_all(drawn, splits, pick, budget) for drawn in (valid, test))
        chosen = {name: choose(tried, problem_bins) for name, (problem_bins, _) in bins.items()}
        for name, (_, problem_bins) in bins.items():
            spent = [tested[chosen[name][x]][problem] for problem, x in enumerate(problem_bins)]
            curves[name].append({"budget": budget, **summary(spent)})
    rows = []
    for name in (PREDICTED, MEASURED):
        problem_bins = bins[name][1]
        for x in sorted(set(problem_bins)):
            accuracy = {str(A): mean_of(of_split, problem_bins, x) for A, of_split in zip(splits, tested, strict=True)}
            row = {"bins": name, "difficulty": x + 1, "problems": problem_bins.count(x), "chosen": splits[chosen[name][x]]}
            rows.append({**row, "accuracy": accuracy})
    return curves, rows


def spend_all(drawn: Drawn, splits: Sequence[int], pick: Selector, budget: float) -> list[list[Spent]]:
    """``spend`` for each split and each problem."""
    return [[spend(split(chains, attempts), pick, budget) for chains in drawn.chains] for attempts in splits]


def binned(valid: Drawn, test: Drawn, difficulty: Callable[[Sequence[Sample]], float]) -> tuple[list[int], list[int]]:
    """Bins of the validation and of the test problems; 0 is the easiest.

    Without ties, all bins have equally many validation problems.
    """
    values, others = ([difficulty(samples) for samples in drawn.samples] for drawn in (valid, test))
    edges = quantiles(values, n=BINS, method="inclusive")
    return [bisect(edges, x) for x in values], [bisect(edges, x) for x in others]


def choose(spent: Sequence[Sequence[Spent]], problem_bins: Sequence[int]) -> list[int]:
    """Index of each bin's best split, the first one in a tie; a bin without problems gets the one that is best overall."""
    everywhere = [fmean(x.right for x in of_split) for of_split in spent]
    found = []
    for x in range(BINS):
        means = [mean_of(of_split, problem_bins, x) for of_split in spent] if x in problem_bins else everywhere
        found.append(means.index(max(means)))
    return found


def mean_of(spent: Sequence[Spent], problem_bins: Sequence[int], x: int) -> float:
    """The accuracy in bin ``x``."""
    return fmean(one.right for one, problem_bin in zip(spent, problem_bins, strict=True) if problem_bin == x)
