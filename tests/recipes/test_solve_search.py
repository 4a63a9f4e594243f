"""Search over the steps of solutions, led by values that are known here."""

import pytest

from quietstar_recipes.common.sampling import Completion, Sampling
from quietstar_recipes.solve import search as recipe
from quietstar_recipes.solve.search import search
from quietstar_recipes.tasks import Multiplication
from tests.recipes.conftest import seeded

TASK = Multiplication(2)  # its chains have three steps
SAMPLING = Sampling(max_new=40)


@pytest.fixture
def rows():
    return TASK.sample(2, "test", seeded(0))


@pytest.fixture
def written(monkeypatch):
    """Completions that the patched rollout wrote, with whether they were greedy. A step has one digit and its end: the digit
    counts up from 0 in each round; greedy ones write 9."""
    calls = []
    plus, mark = (TASK.tokenizer.convert_tokens_to_ids(x) for x in ("+", "####"))
    digits = TASK.tokenizer.convert_tokens_to_ids([*"0123456789"])

    def rollout(model, task, prompts, k=1, *, temperature, max_new, ends, seed, top_p, batch_size):
        assert ends == task.step_ids
        found = []
        for number, prompt in enumerate(prompts):
            steps = sum(x in (plus, mark) for x in prompt)
            end = [plus, mark, task.end_id][steps]
            ids = [digits[9 if temperature == 0 else number % 8], end]
            found.append([Completion(ids, [-1.0, -0.5])])
        calls.append((len(prompts), temperature))
        return found

    monkeypatch.setattr(recipe, "rollout", rollout)
    return calls


def digits_of(ids):
    return [int(x) for x in TASK.tokenizer.decode(ids).split() if x.isdigit()]


def test_beam_search_keeps_the_best_and_counts_all_tokens(rows, written):
    seen = []

    def value(prompts, begun):
        seen.append([digits_of(ids) for ids in begun])
        return [float(sum(digits_of(ids))) for ids in begun]

    found = search(None, TASK, rows, value, beams=4, width=2, sampling=SAMPLING)
    assert written == [(8, 1.0), (8, 1.0), (8, 1.0)]  # four candidates of each of two problems, three steps
    assert seen[0] == [[i] for i in range(8)]
    # Of 0 to 3, 3 and 2 stay, twice each.
    assert [x[0] for x in seen[1]] == [3, 3, 2, 2, 7, 7, 6, 6]
    assert seen[1][0] == [3, 0] and seen[1][3] == [2, 3]
    # Then 2 + 3, and 3 + 1 as the first of two that are worth 4.
    assert seen[2][:4] == [[2, 3, 0], [2, 3, 1], [3, 1, 2], [3, 1, 3]]
    assert [x.tokens for x in found] == [4 * 3 * 2] * 2
    assert [len(x.samples) for x in found] == [4, 4]
    assert all(x.tokens == 6 and x.logprob == -4.5 for each in found for x in each.samples)
    assert [x.score for x in found[0].samples] == [5, 6, 6, 7]


def test_a_width_that_does_not_divide(rows):
    with pytest.raises(ValueError, match="search: width must divide beams=4, got 3"):
        search(None, TASK, rows, lambda *_: [], 4, 3, SAMPLING)


def test_look_ahead_values_where_greedy_steps_lead_and_pays_for_them(rows, written):
    seen = []

    def value(prompts, begun):
        seen.append([digits_of(ids) for ids in begun])
        return [float(digits_of(ids)[0]) for ids in begun]

    found = search(None, TASK, rows[:1], value, beams=2, width=2, sampling=SAMPLING, lookahead=1)
    assert seen[0] == [[0, 9], [1, 9]] and seen[1] == [[1, 0, 9], [1, 1, 9]]
    assert seen[2] == [[1, 0, 0], [1, 0, 1]]  # whole ones have nothing ahead
    assert written == [(2, 1.0), (2, 0), (2, 1.0), (2, 0), (2, 1.0)]
    assert found[0].tokens == 2 * 5 * 2
    assert {x.tokens for x in found[0].samples} == {6}  # what was looked at is not in the solution


def test_whole_solutions_are_put_aside(rows, monkeypatch):
    end, plus = TASK.end_id, TASK.tokenizer.convert_tokens_to_ids("+")
    rounds = iter([[[5, end], [6, plus], [7, plus], [8, plus]], [[5, plus]] * 3, [[5, end]] * 3])
    monkeypatch.setattr(recipe, "rollout", lambda *_, **__: [[Completion(ids, [-1.0] * len(ids))] for ids in next(rounds)])
    found = search(None, TASK, rows[:1], lambda prompts, begun: [-1.0] * len(begun), 4, 2, SAMPLING)
    assert sorted(x.tokens for x in found[0].samples) == [2, 6, 6, 6] and found[0].tokens == 8 + 6 + 6


def test_a_solution_ends_at_the_length_limit(rows, monkeypatch):
    plus = TASK.tokenizer.convert_tokens_to_ids("+")
    limits = []

    def rollout(model, task, prompts, *, max_new, **rest):
        limits.append(max_new)
        return [[Completion([5, plus], [-1.0] * 2)] for _ in prompts]

    monkeypatch.setattr(recipe, "rollout", rollout)
    found = search(None, TASK, rows[:1], lambda prompts, begun: [-1.0] * len(begun), 2, 1, Sampling(max_new=5))
    assert limits == [5, 3, 1] and [x.tokens for x in found[0].samples] == [5, 5]
    assert found[0].samples[0].answer is None


def test_real_steps_are_those_of_the_task(solver):
    model, task = solver
    rows = task.sample(3, "test", seeded(1))
    ends = []

    def value(prompts, begun):
        ends.extend(ids[-1] in task.step_ids or ids[-1] == task.end_id or len(ids) == 10 for ids in begun)
        return [-1.0] * len(begun)

    found = search(model, task, rows, value, 4, 2, Sampling(max_new=10))
    assert all(ends) and len(found) == 3
    again = search(model, task, rows, value, 4, 2, Sampling(max_new=10))
    assert found == again
    assert any(x.right for each in found for x in each.samples)
