"""What SCoRe's baselines learn from: right attempts after wrong ones, of the model's own."""

import pytest

from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.score.attempts import attempt
from quietstar_recipes.score.baselines import corrected, paired
from tests.recipes.conftest import seeded

SAMPLING = {"max_new": 8, "temperature": 1.0}


@pytest.fixture
def rows(solver):
    return solver[1].sample(20, "train", seeded(3))


def test_pairs_are_a_wrong_and_a_right_attempt_at_one_problem(solver, rows):
    model, task = solver
    found = paired(model, task, rows, 4, SAMPLING, seed=0)
    drawn = rollout(model, task, [row.prompt_ids for row in rows], 4, **SAMPLING, seed=0)
    expected, numbers = [], []
    for row, completions in zip(rows, drawn, strict=True):
        right = [x.ids for x in completions if task.check(row, x.ids)]
        wrong = [x.ids for x in completions if not task.check(row, x.ids)]
        numbers.append(min(len(right), len(wrong)))
        for first, second in list(zip(wrong, right, strict=False)):
            expected.append((row.prompt_ids + task.trimmed(first) + task.again_ids, second))
    assert found == expected and len(found) == sum(numbers) > 3


def test_corrections_are_second_attempts_that_are_right_after_a_wrong_one(solver, rows):
    model, task = solver
    found = corrected(model, task, rows, 5, SAMPLING, seed=0)
    repeated = [row for row in rows for _ in range(5)]
    drawn = attempt(model, task, repeated, SAMPLING, 0)
    fixed = [i for i in range(100) if not task.check(repeated[i], drawn.first[i]) and task.check(repeated[i], drawn.second[i])]
    assert found == [(drawn.requests[i], drawn.second[i]) for i in fixed]
