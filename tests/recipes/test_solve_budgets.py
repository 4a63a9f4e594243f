"""What a budget of tokens buys: solutions, splits into chains, curves over it; and which way is chosen for which difficulty."""

import dataclasses

import pytest

from quietstar_recipes.common.selectors import Sample, hierarchical, majority
from quietstar_recipes.solve.budgets import (
    MEASURED,
    ONE,
    PREDICTED,
    Spent,
    affordable,
    alone,
    compute_optimal,
    curve,
    from_all,
    lengths,
    measure,
    measured,
    oracle,
    predicted,
    spend,
    split,
)


def several(*parts):
    return [Sample(answer, answer == "8", tokens, -1.0) for answer, tokens in parts]


def any_right(chains):
    return max((x for chain in chains for x in chain), key=lambda x: x.right)


def test_a_budget_buys_the_solutions_nearest_to_it_and_at_least_one():
    chain = several(("3", 4), ("8", 6), ("8", 5))
    for chains in ([chain], alone(chain)):
        bought = [affordable(chains, budget) for budget in (1, 6.9, 7, 10, 12.4, 12.5, 99)]
        assert [sum(map(len, some)) for some in bought] == [1, 1, 2, 2, 2, 3, 3]
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


def test_difficulties():
    samples = several(("8", 1), ("3", 1), ("3", 1), (None, 1))
    assert measured(samples) == -0.25 and predicted(samples) == -0.5  # the vote is wrong, which the prediction can't know
    scored = [dataclasses.replace(x, score=score) for x, score in zip(samples, (-1.0, -2.0, -3.0, -4.0), strict=True)]
    assert predicted(scored) == 2.5
    assert predicted(several((None, 1), (None, 1))) == 0


def problem(easy, looks_easy):
    """Samples, and what two ways reach: chains solve easy problems and searches hard ones, both only with the larger budget."""
    samples = [Sample("8", i < 4 if easy else i < 1, 2, -1.0, -1.0 if looks_easy else -9.0) for i in range(4)]
    return samples, {"chains": [0.0, float(easy)], "search": [0.0, float(not easy)]}


def drawn(problems):
    samples, ways = zip(*[problem(*x) for x in problems], strict=True)
    tables = {name: [[Spent(way[name][i], 2.0 * (i + 1)) for way in ways] for i in range(2)] for name in ways[0]}
    return samples, tables


VALID = [(True, True)] * 6 + [(False, False)] * 4


def test_each_difficulty_has_the_way_that_validation_problems_chose():
    valid, tried = drawn(VALID)
    test, tested = drawn([(True, True)] * 3 + [(False, False)] * 4 + [(True, False)] * 2 + [(False, True)])
    found, rows = compute_optimal(valid, test, tried, tested)
    points = {name: curve(table, [2, 4]) for name, table in found.items()}
    last = {name: several[-1]["accuracy"] for name, several in points.items()}
    assert last == {ONE: pytest.approx(0.5), PREDICTED: pytest.approx(0.7), MEASURED: 1.0}
    assert all(point["tokens"] == point["budget"] for several in points.values() for point in several)
    shown = {(row["bins"], row["chosen"]): (row["problems"], row["accuracy"]) for row in rows}
    assert shown == {
        (PREDICTED, "chains"): (4, {"chains": 0.75, "search": 0.25}),
        (PREDICTED, "search"): (6, {"chains": pytest.approx(2 / 6), "search": pytest.approx(4 / 6)}),
        (MEASURED, "chains"): (5, {"chains": 1.0, "search": 0.0}),
        (MEASURED, "search"): (5, {"chains": 0.0, "search": 1.0}),
    }
    for name in (PREDICTED, MEASURED):
        difficulties = [row["difficulty"] for row in rows if row["bins"] == name]
        assert difficulties == sorted(difficulties) and len(difficulties) == 2


def test_test_problems_choose_nothing():
    valid, tried = drawn(VALID)
    test, tested = drawn([(True, True), (False, False)])
    wrong = {name: [[Spent(1 - x.right, x.tokens) for x in spent] for spent in table] for name, table in tested.items()}
    chosen = [[row["chosen"] for row in compute_optimal(valid, test, tried, x)[1]] for x in (tested, wrong)]
    assert chosen[0] == chosen[1] == ["chains", "search", "chains", "search"]
    samples = [[dataclasses.replace(x, right=not x.right) for x in some] for some in test]
    curves = [compute_optimal(valid, x, tried, tested)[0] for x in (test, samples)]
    assert curves[0][PREDICTED] == curves[1][PREDICTED] and curves[0][MEASURED] != curves[1][MEASURED]
