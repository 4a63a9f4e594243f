"""What a budget of tokens buys: whole solutions, splits into chains, and curves over it."""

import pytest

from quietstar.recipes.common.selectors import Sample, majority
from quietstar.recipes.solve_budgets import affordable, curve, lengths, oracle, spend, split


def several(*parts):
    return [Sample(answer, answer == "8", tokens, -1.0) for answer, tokens in parts]


def any_right(samples):
    return max(samples, key=lambda x: x.right)


def test_a_budget_buys_whole_solutions_and_at_least_one():
    samples = several(("3", 4), ("8", 6), ("8", 5))
    assert [len(affordable(samples, budget)) for budget in (1, 4, 9.9, 10, 14, 15, 99)] == [1, 1, 1, 2, 2, 3, 3]


def test_curves_are_means_over_problems_at_the_tokens_that_were_used():
    problems = [[several(("3", 4), ("8", 6), ("8", 5))], [several(("8", 2), ("8", 2), ("3", 2))]]
    points = curve(problems, majority, [4, 15])
    assert [point["accuracy"] for point in points] == [0.5, 1.0]
    assert [point["tokens"] for point in points] == [(4 + 4) / 2, (15 + 6) / 2]
    alone = [[[x] for x in chain] for [chain] in problems]
    assert curve(alone, majority, [15])[0] == points[1]  # all of them, in any order
    first = curve(alone, lambda x: x[0], [4])[0]
    assert first["accuracy"] == pytest.approx(2 / 3, abs=0.2) and 0 < first["accuracy"] < 1  # a random one of each problem


@pytest.mark.parametrize("most", [1, 2, 4, 8, 16])
def test_the_chains_contain_every_split(most):
    until = lengths(most, most)
    chains = [several(*[("8", 1)] * n) for n in until]
    for attempts in range(1, most + 1):
        assert [len(x) for x in split(chains, attempts)] == [attempts] * (most // attempts)
    assert sum(until) == {1: 1, 2: 3, 4: 8, 8: 20, 16: 50}[most]
    assert lengths(8, 2) == [2, 2, 2, 2, 1, 1, 1, 1]


def test_a_budget_is_spent_on_one_chain_after_the_other():
    chains = [several(("1", 3), ("2", 3)), several(("1", 3), ("8", 3))]
    assert spend(chains, any_right, 12).right == 1 and spend(chains, any_right, 12).tokens == 12
    assert spend(chains, any_right, 3).right == 0 and spend(chains, any_right, 3).tokens == 3
    half = spend(chains, any_right, 6)  # a random one of the two chains, never both first attempts
    assert 0.2 < half.right < 0.8 and half.tokens == 6
    assert spend([*chains, chains[0]], majority, 9.5).tokens == 9


def test_oracle_is_pass_at_k():
    points = oracle([several(("8", 1), ("3", 1), ("3", 1), ("3", 1))], 5.0)
    assert [point["accuracy"] for point in points] == pytest.approx([0.25, 0.5, 1.0])
    assert [point["budget"] for point in points] == [5, 10, 20]
