"""Choosing one of several solutions to a problem, and how often the choice is right."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
ORDERS = 16  # random orders of a problem's samples, used where there are too many subsets of size k to try all


@dataclass(frozen=True)
class Sample:
    """A solution of one problem."""

    answer: str | None  # None if no answer can be read
    right: bool  # whether the answer is right
    tokens: int  # number of generated tokens
    logprob: float  # of all its tokens, under the model that generated it
    score: float | None = None  # a verifier's; higher is better. None without a verifier


Selector = Callable[[Sequence[Sample]], Sample]


def majority(samples: Sequence[Sample]) -> Sample:
    """A sample with the most frequent answer; ties go to the answer with the larger sum of log-probabilities."""
    groups = by_answer(samples)
    return max(groups, key=lambda group: (len(group), sum(x.logprob for x in group)))[0] if groups else samples[0]


def likeliest(samples: Sequence[Sample]) -> Sample:
    """The most likely sample under the model that generated it."""
    return max(samples, key=lambda x: x.logprob)


def best(samples: Sequence[Sample]) -> Sample:
    """The sample that the verifier scores highest."""
    return max(samples, key=score)


def weighted(samples: Sequence[Sample]) -> Sample:
    """Best-of-N weighted: the best sample with the answer that has the most probability under the verifier.

    The verifier's scores are log-probabilities; the probabilities of samples with the same answer are added up.
    """
    groups = by_answer(samples)
    return best(max(groups, key=lambda group: log_sum([score(x) for x in group]))) if groups else samples[0]


def hierarchical(chains: Sequence[Sequence[Sample]]) -> Sample:
    """``weighted`` within each chain of revisions, then among the chains' choices (arXiv 2408.03314, appendix I)."""
    return weighted([weighted(chain) for chain in chains])


def by_answer(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples that have an answer, grouped by it."""
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for x in samples:
        if x.answer is not None:
            groups[x.answer].append(x)
    return list(groups.values())


def score(sample: Sample) -> float:
    """The verifier's score. Raises ValueError if there is none."""
    if sample.score is None:
        raise ValueError("a selector by verifier needs samples with a score")
    return sample.score


def log_sum(values: Sequence[float]) -> float:
    """log(sum(exp(values))), without overflow."""
    most = max(values)
    return most + math.log(sum(math.exp(x - most) for x in values))


def best_of(k: int, scores: Sequence[float], right: Sequence[bool]) -> float:
    """How often the best-scored of k out of N samples is right, over all subsets of size k.

    V-STaR, arXiv 2402.06457, section 3. With the samples sorted by score, the i-th from 0 is the best in C(N-i-1, k-1) of the
    C(N, k) subsets.
    """
    N = len(scores)
    order = sorted(range(N), key=lambda i: -scores[i])
    return sum(math.comb(N - i - 1, k - 1) * right[order[i]] for i in range(N - k + 1)) / math.comb(N, k)


def pass_at(k: int, right: Sequence[bool]) -> float:
    """How often at least one of k out of N samples is right, over all subsets of size k (arXiv 2107.03374)."""
    N, c = len(right), sum(right)
    return 1 - math.comb(N - c, k) / math.comb(N, k)


def powers_of_two(most: int) -> list[int]:
    """The powers of 2 from 1 to ``most``; none for 0."""
    return [2**i for i in range(most.bit_length())]


def choice_of(k: int, samples: Sequence[Sample], pick: Selector) -> float:
    """How often the one picked from k out of N samples is right, over random subsets of size k; exact for k = N."""
    shuffled = orders(samples, ORDERS) if k < len(samples) else [samples]
    return sum(pick(x[:k]).right for x in shuffled) / len(shuffled)


def orders(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """``count`` orders: the given one, then random ones, the same on every call."""
    shuffle = random.Random(0)
    return [items, *(shuffle.sample(list(items), len(items)) for _ in range(count - 1))]


def auc(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool]]) -> float | None:
    """How often a right solution has a higher score than a wrong one of the same problem; ties count half.

    None if no problem has both right and wrong solutions.
    """
    wins, pairs = 0.0, 0
    for values, truth in zip(scores, right, strict=True):
        by_truth = {flag: [x for x, y in zip(values, truth, strict=True) if y == flag] for flag in (True, False)}
        wins += sum((x > y) + 0.5 * (x == y) for x in by_truth[True] for y in by_truth[False])
        pairs += len(by_truth[True]) * len(by_truth[False])
    return wins / pairs if pairs else None
