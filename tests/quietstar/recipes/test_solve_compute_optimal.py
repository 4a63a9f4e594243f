"""Which split of a budget is chosen for which difficulty."""

import dataclasses

import pytest

from quietstar.recipes.common.selectors import Sample
from quietstar.recipes.solve_budgets import lengths
from quietstar.recipes.solve_compute_optimal import MEASURED, ONE, PREDICTED, Drawn, compute_optimal, measured, predicted


def several(*parts):
    return [Sample(answer, answer == "8", tokens, -1.0) for answer, tokens in parts]


def any_right(samples):
    return max(samples, key=lambda x: x.right)


def test_difficulties():
    samples = several(("8", 1), ("3", 1), ("3", 1), (None, 1))
    assert measured(samples) == -0.25 and predicted(samples) == -0.5  # the vote is wrong, which the prediction can't know
    scored = [dataclasses.replace(x, score=score) for x, score in zip(samples, (-1.0, -2.0, -3.0, -4.0), strict=True)]
    assert predicted(scored) == 2.5
    assert predicted(several((None, 1), (None, 1))) == 0


def problem(easy, looks_easy):
    """The fourth attempt of a chain is right for easy problems, the first one of the last chain for hard ones."""
    samples = [Sample("8", i < 4 if easy else i < 1, 2, -1.0, -1.0 if looks_easy else -9.0) for i in range(4)]
    chains = [[Sample("3", False, 2, -1.0)] * n for n in lengths(4, 4)]
    right = Sample("8", True, 2, -1.0)
    if easy:
        chains[0] = [*chains[0][:3], right]
    else:
        chains[3] = [right]
    return samples, chains


def drawn(problems):
    return Drawn(*zip(*[problem(*x) for x in problems], strict=True))


def test_each_difficulty_has_the_split_that_validation_problems_chose():
    valid = drawn([(True, True)] * 6 + [(False, False)] * 4)
    test = drawn([(True, True)] * 3 + [(False, False)] * 4 + [(True, False)] * 2 + [(False, True)])
    curves, rows = compute_optimal(valid, test, any_right, [2, 4, 8])
    last = {name: points[-1]["accuracy"] for name, points in curves.items()}
    assert last == {ONE: pytest.approx(0.5), PREDICTED: pytest.approx(0.7), MEASURED: 1.0}
    assert all(point["tokens"] == point["budget"] for points in curves.values() for point in points)
    assert [point["budget"] for point in curves[PREDICTED]] == [2, 4, 8]
    found = {(row["bins"], row["chosen"]): (row["problems"], row["accuracy"]) for row in rows}
    assert found == {
        (PREDICTED, 4): (4, {"1": 0.25, "2": 0.0, "4": 0.75}),
        (PREDICTED, 1): (6, {"1": pytest.approx(4 / 6), "2": 0.0, "4": pytest.approx(2 / 6)}),
        (MEASURED, 4): (5, {"1": 0.0, "2": 0.0, "4": 1.0}),
        (MEASURED, 1): (5, {"1": 1.0, "2": 0.0, "4": 0.0}),
    }
    for name in (PREDICTED, MEASURED):
        difficulties = [row["difficulty"] for row in rows if row["bins"] == name]
        assert difficulties == sorted(difficulties) and len(difficulties) == 2


def test_test_problems_choose_nothing():
    valid = drawn([(True, True)] * 6 + [(False, False)] * 4)
    shown = drawn([(True, True), (False, False)])
    wrong = [[[dataclasses.replace(x, right=False) for x in chain] for chain in chains] for chains in shown.chains]
    chosen = [
        [row["chosen"] for row in compute_optimal(valid, Drawn(shown.samples, chains), any_right, [2, 4, 8])[1]]
        for chains in (shown.chains, wrong)
    ]
    assert chosen[0] == chosen[1] == [4, 1, 4, 1]
    samples = [[dataclasses.replace(x, right=not x.right) for x in several] for several in shown.samples]
    curves = [compute_optimal(valid, Drawn(x, shown.chains), any_right, [2, 4, 8])[0] for x in (shown.samples, samples)]
    assert curves[0][PREDICTED] == curves[1][PREDICTED] and curves[0][MEASURED] != curves[1][MEASURED]
