"""Choosing among solutions: formulas against enumeration."""

import itertools
import math

import pytest
import torch

from quietstar_recipes.common.selectors import Sample, auc, best, best_of, choice_of, likeliest, majority, pass_at, weighted
from tests.recipes.conftest import seeded


def samples(*parts):
    return [Sample(answer, answer == "8", 5, logprob, score) for answer, logprob, score in parts]


@pytest.mark.parametrize("k", range(1, 7))
def test_best_of_k_and_pass_at_k_are_means_over_all_choices(k):
    generator = seeded(k)
    scores = torch.rand(6, generator=generator).tolist()
    right = (torch.rand(6, generator=generator) < 0.5).tolist()
    choices = list(itertools.combinations(range(6), k))
    chosen = [right[max(choice, key=lambda i: scores[i])] for choice in choices]
    assert best_of(k, scores, right) == pytest.approx(sum(chosen) / len(choices), abs=1e-12)
    solved = [any(right[i] for i in choice) for choice in choices]
    assert pass_at(k, right) == pytest.approx(sum(solved) / len(choices), abs=1e-12)


def test_majority_counts_answers_then_log_probabilities():
    assert majority(samples((None, 0, 0), (None, 0, 0), ("3", -1, 0))).answer == "3"
    assert majority(samples(("8", -9, 0), ("3", -1, 0), ("8", -9, 0))).answer == "8"
    assert majority(samples(("8", -2, 0), ("3", -1, 0))).answer == "3"
    assert majority(samples((None, 0, 0))).answer is None


def test_likeliest_best_and_weighted():
    several = samples(("3", -1.0, math.log(0.4)), ("8", -2.0, math.log(0.3)), ("8", -3.0, math.log(0.3)))
    assert likeliest(several).answer == "3" and best(several).answer == "3"
    assert weighted(several).answer == "8"  # 0.3 + 0.3 against 0.4
    with pytest.raises(ValueError, match="needs samples with a score"):
        best([Sample("8", True, 1, -1.0)])


def test_choice_of_k_is_exact_for_all_and_near_the_mean_for_one():
    several = samples(*[("8", -1, 0)] * 3, *[("3", -1, 0)] * 5)
    assert choice_of(8, several, majority) == 0
    assert choice_of(1, several, majority) == pytest.approx(3 / 8, abs=0.35)
    assert choice_of(1, several, majority) not in (0, 1)


def test_auc_compares_within_a_problem():
    assert auc([[1.0, 2.0], [-5.0, -6.0]], [[False, True], [True, False]]) == 1
    assert auc([[1.0, 2.0, 2.0]], [[True, True, False]]) == 0.25  # below, and equal, which counts half
    assert auc([[1.0, 2.0]], [[True, True]]) is None
