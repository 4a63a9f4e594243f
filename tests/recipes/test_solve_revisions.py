"""Chains of revisions: what an attempt sees, what a reviser learns from, and how its attempts are scored."""

import random
from itertools import permutations

import pytest

from quietstar_recipes.common.sampling import Completion, Sampling
from quietstar_recipes.common.selectors import Sample
from quietstar_recipes.common.solutions import revision_prompt
from quietstar_recipes.common.training import SFTConfig
from quietstar_recipes.solve import revisions as recipe
from quietstar_recipes.solve.revisions import edit_distance, revise, revisions, train_chain_verifier, train_reviser
from quietstar_recipes.solve.run import Config, chain_lengths
from quietstar_recipes.solve.values import value_scorer, values
from tests.recipes.conftest import seeded


def table_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def test_edit_distance_is_that_of_the_table():
    choose = random.Random(0)
    for _ in range(300):
        a, b = ("".join(choose.choices("abc ", k=choose.randint(0, 70 if i else 9))) for i in range(2))
        assert edit_distance(a, b) == table_distance(a, b), (a, b)
    assert edit_distance("kitten", "sitting") == 3


def solutions_of(task, row):
    """Three different wrong solutions, the first of which is nearest to the right one, and the right one."""
    digits = task.tokenizer.convert_tokens_to_ids([*"0123456789"])
    right = task.completion_ids(row)
    other = next(x for x in digits if x != right[-2])
    near = [*right[:-2], other, task.end_id]
    farther = [digits[0], digits[0], digits[0], *near]
    return right, near, [farther, [digits[0], *farther]]


def test_every_right_solution_comes_at_once_and_after_attempts_the_last_right_or_nearest(solver):
    _, task = solver
    [row] = task.sample(1, "train", seeded(1))
    right, near, far = solutions_of(task, row)
    unreadable = right[:-1]
    written = [Completion(ids, []) for ids in (far[0], right, unreadable, near, right, far[1])]
    kept = []
    for seed in range(60):
        examples = revisions(task, row, written, random.Random(seed))
        assert [target for _, target in examples] == [right] * 4
        assert [prompt == row.prompt_ids for prompt, _ in examples] == [True, False, True, False]
        for prompt, _ in examples[1::2]:
            wrong = [near, *far]
            before = [[], *([x] for x in wrong), *([x, y] for x in wrong for y in wrong), *map(list, permutations(wrong))]
            [shown] = [x for some in before for x in ([*some, right], [*some, near]) if revision_prompt(task, row, x) == prompt]
            assert near not in shown[:-1] or shown[-1] == right
            kept.append(shown[-1] == right)
    assert sum(kept) / len(kept) == pytest.approx(0.5, abs=0.15)
    assert revisions(task, row, [x for x in written if x.ids != right], random.Random(0)) == []
    alone = revisions(task, row, [Completion(right, [])], random.Random(0))
    assert alone == [(row.prompt_ids, right), (revision_prompt(task, row, [right]), right)]


def test_nothing_to_revise(solver, monkeypatch):
    model, task = solver
    monkeypatch.setattr(task, "check", lambda row, ids: False)
    with pytest.raises(ValueError, match="none of 3 training problems has a right solution to learn revisions from"):
        train_reviser(model, task, task.sample(3, "train", seeded(1)), 2, 1, SFTConfig(), Sampling(max_new=5))


@pytest.mark.parametrize("valid_problems, until", [(0, [8]), (5, [8, 4, 2, 2, 1, 1, 1, 1])])
def test_an_attempt_sees_the_last_four_of_its_own_chain(solver, monkeypatch, valid_problems, until):
    model, task = solver
    rows = task.sample(2, "test", seeded(1))
    asked, prompt_of = [], {}

    def rollout(model, task, prompts, **rest):
        asked.append(len(prompts))
        written = []
        for number, prompt in enumerate(prompts):
            attempt = [3 + len(asked), 3 + number, task.end_id]
            prompt_of[tuple(attempt)] = prompt
            written.append([Completion(attempt, [-1.0] * 3)])
        return written

    answers = []

    def to_samples(task, owners, chains, scorer):
        answers.extend(zip(owners, chains, strict=True))
        return [[Sample(str(x.ids), False, 3, -1.0) for x in chain] for chain in chains]

    monkeypatch.setattr(recipe, "rollout", rollout)
    monkeypatch.setattr(recipe, "to_samples", to_samples)
    assert chain_lengths(Config(samples=8, attempts=9, valid_problems=valid_problems)) == until
    chains = revise(model, task, rows, until, Sampling())
    assert [[len(chain) for chain in several] for several in chains] == [until, until]
    assert asked == [2 * sum(n > number for n in until) for number in range(8)]
    for row, chain in answers:
        for number, x in enumerate(chain):
            before = [id_ for y in chain[max(0, number - 4) : number] for id_ in y.ids + task.again_ids]
            assert prompt_of[tuple(x.ids)] == row.prompt_ids + before


def test_a_judge_scores_an_attempt_after_the_earlier_ones(solver):
    model, task = solver
    rows = task.sample(2, "test", seeded(1))
    sampling = Sampling(max_new=8)
    scorer = value_scorer(model, task)
    plain, judged = (revise(model, task, rows, [3], sampling, scorer, judge) for judge in (None, model))
    written = recipe.write_chains(model, task, rows, [3, 3], sampling)
    for row, chain, [one], [other] in zip(rows, written, plain, judged, strict=True):
        attempts = [task.trimmed(x.ids) for x in chain]
        prompts = [revision_prompt(task, row, attempts[:number]) for number in range(3)]
        assert [x.score for x in other] == pytest.approx(values(model, task, prompts, attempts), abs=1e-5)
        assert [x.score for x in one] == pytest.approx(scorer([row] * 3, attempts), abs=1e-5)
        assert one[0].score == pytest.approx(other[0].score, abs=1e-5) and one[2].score != pytest.approx(other[2].score)
        assert [(x.answer, x.tokens) for x in one] == [(x.answer, x.tokens) for x in other]


def test_what_a_judge_learns(solver, monkeypatch):
    model, task = solver
    rows = task.sample(3, "train", seeded(1))
    right = [[Completion(task.completion_ids(row), [])] * 2 for row in rows[:2]]
    chains = [*right, [Completion(task.completion_ids(rows[0]), []), Completion([3], [])]]  # wrong, then unreadable
    learnt = []
    monkeypatch.setattr(recipe, "write_chains", lambda *_: chains)
    monkeypatch.setattr(recipe, "train_values", lambda model, task, several, *_: learnt.extend(several) or (model, []))
    train_chain_verifier(model, model, task, rows, 2, 1, SFTConfig(), Sampling(max_new=10))
    assert [x.problem for x in learnt] == [0, 0, 1, 1, 2]
    assert [x.values[0] for x in learnt] == [1, 1, 1, 1, float(task.check(rows[2], task.completion_ids(rows[0])))]
    for x in learnt:
        row = rows[x.problem]
        assert x.ends == [len(x.ids)] and x.values == [float(task.check(row, x.ids))]
        assert x.prompt[: len(row.prompt_ids)] == row.prompt_ids
    longer = [x.prompt != rows[x.problem].prompt_ids for x in learnt]
    assert longer == [False, True, False, True, False]
