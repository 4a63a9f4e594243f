"""What a budget of tokens buys: whole solutions, splits into chains, and curves over it."""

import pytest

from quietstar_recipes.common.selectors import Sample, hierarchical, majority
from quietstar_recipes.solve.budgets import affordable, alone, curve, from_all, lengths, measure, oracle, spend, split


def several(*parts):
    return [Sample(answer, answer == "8", tokens, -1.0) for answer, tokens in parts]


def any_right(chains):
    return max((x for chain in chains for x in chain), key=lambda x: x.right)


def test_a_budget_buys_whole_solutions_and_at_least_one():
    chain = several(("3", 4), ("8", 6), ("8", 5))
    for chains in ([chain], alone(chain)):
        bought = [affordable(chains, budget) for budget in (1, 4, 9.9, 10, 14, 15, 99)]
        assert [sum(map(len, some)) for some in bought] == [1, 1, 1, 2, 2, 3, 3]
    two = affordable([chain[:2], chain[2:]], 10)
    assert two == [chain[:2]]  # a chain of which nothing fits is not there
    assert affordable([chain[:2], chain[2:]], 15) == [chain[:2], chain[2:]]


def test_curves_are_means_over_problems_at_the_tokens_that_were_used():
    problems = [[several(("3", 4), ("8", 6), ("8", 5))], [several(("8", 2), ("8", 2), ("3", 2))]]
    pick = from_all(majority)
    points = curve(measure(problems, pick, [4, 15]), [4, 15])
    assert [point["accuracy"] for point in points] == [0.5, 1.0]
    assert [point["tokens"] for point in points] == [(4 + 4) / 2, (15 + 6) / 2]
    each = [alone(chain) for [chain] in problems]
    assert curve(measure(each, pick, [15]), [15])[0] == points[1]  # all of them, in any order
    first = curve(measure(each, lambda chains: chains[0][0], [4]), [4])[0]
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
    assert spend([*chains, chains[0]], from_all(majority), 9.5).tokens == 9


def test_hierarchical_choice_sees_which_chain_an_attempt_is_of():
    """By all attempts at once the answer of the one long chain would win."""

    def chain(*parts):
        return [Sample(answer, answer == "8", 1, -1.0, score) for answer, score in parts]

    chains = [chain(*[("3", -1.2)] * 4), chain(("8", -1.0), ("1", -9.0)), chain(("8", -1.1))]
    assert hierarchical(chains).answer == "8"
    assert spend(chains, hierarchical, 7).right == 1
    assert hierarchical(chains).score == -1.0  # the best one with that answer


def test_oracle_is_pass_at_k():
    points = curve(oracle([several(("8", 1), ("3", 1), ("3", 1), ("3", 1))], 5.0), [5, 10, 20])
    assert [point["accuracy"] for point in points] == pytest.approx([0.25, 0.5, 1.0])
    assert [point["tokens"] for point in points] == [5, 10, 20]
