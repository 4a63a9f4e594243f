"""Which way of spending is chosen for which difficulty."""

import dataclasses

import pytest

from quietstar_recipes.common.selectors import Sample
from quietstar_recipes.solve.budgets import (
    MEASURED,
    ONE,
    PREDICTED,
    Spent,
    by_difficulty,
    compute_optimal,
    curve,
    measured,
    predicted,
)


def several(*parts):
    return [Sample(answer, answer == "8", tokens, -1.0) for answer, tokens in parts]


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


def test_by_difficulty_has_every_budget_of_every_method():
    valid, _ = drawn(VALID)
    test, tested = drawn([(True, True)] * 3 + [(False, False)])
    rows = by_difficulty(valid, test, tested)
    assert [(row["problems"], row["accuracy"]) for row in rows] == [
        (3, {"chains": [0.0, 1.0], "search": [0.0, 0.0]}),
        (1, {"chains": [0.0, 0.0], "search": [0.0, 1.0]}),
    ]
    assert rows[0]["difficulty"] < rows[1]["difficulty"]
