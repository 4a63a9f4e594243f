"""Verifiers of steps: what they learn from, and what they learn."""

import math

import pytest
import torch

from quietstar_recipes.common.logprobs import likelihoods
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.sampling import Completion, Sampling
from quietstar_recipes.common.training import SFTConfig
from quietstar_recipes.solve import values as recipe
from quietstar_recipes.solve.values import Valued, outcomes, roll_out, train_values, value_scorer, values
from quietstar_recipes.tasks import Addition, Multiplication, WordProblems
from tests.recipes.conftest import seeded


def test_steps_of_solutions():
    task = Multiplication(3)
    [row] = task.sample(1, "train", seeded(0))
    ids = task.completion_ids(row)
    steps = [ids[start:end] for start, end in zip([0, *task.step_ends(ids)], task.step_ends(ids), strict=False)]
    assert [task.tokenizer.decode(step).split()[-1] for step in steps] == ["+", "(", "+", "####", "<end>"]
    assert sum(steps, []) == ids
    assert task.step_ends(ids[:3]) == [3] and task.step_ends(ids[:5]) == [5]
    stories = WordProblems()
    [row] = stories.sample(1, "train", seeded(0))
    assert len(stories.step_ends(stories.completion_ids(row))) == 3  # two calculations and the answer


def test_a_value_is_the_share_of_rollouts_that_end_right(monkeypatch):
    task = Multiplication(2)
    rows = task.sample(2, "train", seeded(0))
    right = [task.completion_ids(row) for row in rows]
    first = task.step_ends(right[0])[0]
    wrong = right[0][:first] + right[1][first:]
    unreadable = right[0][:-1]
    asked = []

    def rollout(model, task, prompts, k, **rest):
        asked.append(prompts)
        if len(asked) == 1:
            return [[Completion(ids, []) for ids in several] for several in ([right[0], wrong, unreadable], [right[1]])]
        # Of three rollouts from where the first row's right solution begins, one ends right; of others none does.
        whole = rows[0].prompt_ids + right[0]
        rest = [whole[len(ids) :] if ids == whole[: len(ids)] else [3] for ids in prompts]
        return [[Completion(ids, []), *[Completion([3], [])] * 2] for ids in rest]

    monkeypatch.setattr(recipe, "rollout", rollout)
    found = roll_out(None, task, rows, 3, 3, Sampling())
    assert [x.ids for x in found] == [right[0], wrong, right[1]] and [x.problem for x in found] == [0, 0, 1]
    assert len(asked[1]) == 5  # two beginnings of each solution; the first one of two solutions is the same
    assert found[0].values == [pytest.approx(1 / 3), pytest.approx(1 / 3), 1.0]
    assert found[1].values == [pytest.approx(1 / 3), 0.0, 0.0]
    assert found[0].ends == task.step_ends(right[0])
    assert [(x.ends, x.values) for x in outcomes(found)][:2] == [([len(right[0])], [1.0]), ([len(wrong)], [0.0])]


def digits_after(count, generator):
    """Solutions of two steps: the first step's digit is even or odd, which is worth 0.8 or 0.1."""
    task = Addition(1)
    mark, end = task.separator_ids, [task.end_id]
    digits = task.tokenizer.convert_tokens_to_ids([*"0123456789"])
    found = []
    for i in range(count):
        a, b = torch.randint(10, (2,), generator=generator).tolist()
        ids = [digits[a], *mark, digits[b], *end]
        found.append(Valued(i, [digits[b]], ids, [2, 4], [0.1 if a % 2 else 0.8, float(b > 4)]))
    return task, found


def test_values_are_learnt():
    task, solutions = digits_after(300, seeded(0))
    model = small_model(task, layers=1, width=32, heads=2, positions=16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    verifier, losses = train_values(model, task, solutions, 60, SFTConfig(learning_rate=1e-2, batch_tokens=300), 0)
    assert len(losses) == 10 and min(losses) < 0.9 * losses[0]
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    for x in solutions[:20]:
        first, last = values(verifier, task, [x.prompt] * 2, [x.ids[:2], x.ids], batch_size=1)
        assert math.exp(first) == pytest.approx(x.values[0], abs=0.25)
        assert math.exp(last) == pytest.approx(x.values[1], abs=0.25)


def test_the_best_weights_on_held_out_problems_are_kept(monkeypatch):
    task, solutions = digits_after(40, seeded(0))
    model = small_model(task, layers=1, width=32, heads=2, positions=16)
    seen = []
    scripted = iter([0.9, 0.2, 0.8, 0.7])

    def held_out_loss(verifier, task, several):
        assert {x.problem % 10 for x in several} == {0} and len(several) == 4
        seen.append({name: x.clone() for name, x in verifier.state_dict().items()})
        return next(scripted)

    monkeypatch.setattr(recipe, "held_out_loss", held_out_loss)
    monkeypatch.setattr(recipe, "CHECKS", 4)
    verifier, losses = train_values(model, task, solutions, 8, SFTConfig(learning_rate=1e-2), 0)
    assert losses == [0.9, 0.2, 0.8, 0.7]
    same = [all(torch.equal(x, y[name]) for name, x in verifier.state_dict().items()) for y in seen]
    assert same == [False, True, False, False]


def test_too_few_problems(solver):
    with pytest.raises(ValueError, match="a verifier needs solutions of more problems: 1 to train, 0 held out"):
        train_values(*solver, [Valued(3, [5], [6], [1], [1.0])], 1, SFTConfig(), 0)


@pytest.mark.long  # peft is slow to import
def test_adapters_are_merged_into_the_verifier(tiny):
    task, solutions = digits_after(60, seeded(0))
    model = tiny("llama", vocab_size=len(task.tokenizer))
    config = SFTConfig(learning_rate=3e-2, warmup=1, batch_tokens=300, lora_rank=2)
    verifier, losses = train_values(model, task, solutions, 20, config, 0)
    assert list(verifier.state_dict()) == list(model.state_dict()) and min(losses) < losses[0]
    held_out = [x for x in solutions if x.problem % 10 == 0]
    assert recipe.held_out_loss(verifier, task, held_out) == pytest.approx(min(losses), abs=1e-4)


def test_a_value_is_the_likelihood_of_the_tokens_and_a_verdict_after_them(solver):
    model, task = solver
    rows = task.sample(3, "test", seeded(1))
    solutions = [task.completion_ids(row)[: 3 + i] for i, row in enumerate(rows)]
    scores = value_scorer(model, task)(rows, solutions)
    for row, ids, score in zip(rows, solutions, scores, strict=True):
        logits = model(torch.tensor([row.prompt_ids + ids])).logits[0, -1].detach()
        [likelihood] = likelihoods(model, [row.prompt_ids], [ids])
        odds = likelihood + float(logits[task.again_ids[0]] - logits[task.end_id])
        assert score == pytest.approx(-math.log1p(math.exp(-odds)), rel=1e-3)
