"""Completions and their log-probabilities."""

import pytest
import torch
from transformers import DynamicCache, modeling_utils

from quietstar_recipes.common.logprobs import likelihoods, logprob
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.sampling import rollout, shifted
from quietstar_recipes.tasks import WordProblems
from tests.recipes.conftest import one_by_one, seeded


@pytest.fixture
def stories():
    """Prompts of different lengths, and a model that ends some completions early."""
    task = WordProblems()
    model = small_model(task, width=32, heads=2, positions=64).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(0, 0.15)
    rows = task.sample(6, "train", seeded(0))
    assert len({len(row.prompt_ids) for row in rows}) > 2
    return task, model, [row.prompt_ids for row in rows]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_log_probabilities_are_those_of_an_ordinary_forward(stories, temperature, top_p):
    task, model, prompts = stories
    written = rollout(model, task, prompts, 3, temperature=temperature, top_p=top_p, max_new=12, batch_size=7)
    assert [len(several) for several in written] == [3] * len(prompts)
    flat = [(prompt, x) for prompt, several in zip(prompts, written, strict=True) for x in several]
    for prompt, x in flat:
        assert 1 <= len(x.ids) <= 12 and task.end_id not in x.ids[:-1]
        assert len(x.ids) == 12 or x.ids[-1] == task.end_id
        torch.testing.assert_close(x.logprob, one_by_one(model, prompt, x.ids), atol=1e-5, rtol=0)
    assert temperature == 0 or len({len(x.ids) for _, x in flat}) > 1
    values, mask = logprob(model, [prompt for prompt, _ in flat], [x.ids for _, x in flat])
    for value, shown, (_, x) in zip(values, mask, flat, strict=True):
        assert shown.sum() == len(x.ids)
        torch.testing.assert_close(value[shown].tolist(), x.logprob, atol=1e-5, rtol=0)
    assert not values[~mask].any()
    sums = likelihoods(model, [prompt for prompt, _ in flat], [x.ids for _, x in flat], batch_size=5)
    torch.testing.assert_close(sums, [sum(x.logprob) for _, x in flat], atol=1e-4, rtol=0)


def test_greedy_takes_the_likeliest_and_batches_change_nothing(stories):
    task, model, prompts = stories
    together = rollout(model, task, prompts, temperature=0, max_new=8)
    for prompt, several in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in several[0].ids:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
        assert rollout(model, task, [prompt], temperature=0, max_new=8)[0][0].ids == several[0].ids


def test_the_seed_fixes_samples_and_the_random_state_is_unchanged(stories):
    task, model, prompts = stories
    state = torch.get_rng_state()
    first, again, other = (rollout(model, task, prompts, 2, max_new=8, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0][0] != first[0][1]
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_that_are_too_long(stories):
    task, model, prompts = stories
    with pytest.raises(ValueError, match="has 64 positions, and prompt and completion need"):
        rollout(model, task, prompts, max_new=60)
    with pytest.raises(ValueError, match="has 64 positions"):
        logprob(model, [[3] * 60], [[4] * 5])


def test_a_small_model_does_not_warn_of_a_mask_that_it_was_given(stories, monkeypatch):
    task, model, prompts = stories
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    same_length = [prompts[0]] * 8  # so that the mask is one of ones
    written = rollout(model, task, same_length, max_new=12)
    assert len({len(several[0].ids) for several in written}) > 1  # rows that have ended are padded
    assert not said


@pytest.mark.parametrize("name", ["cache", "past_key_values", "another"])
def test_positions_are_shifted_whatever_the_cache_is_called(name):
    model, seen = torch.nn.Module(), []
    model.forward = lambda **given: seen.append(given["position_ids"].tolist())
    cache = DynamicCache()
    with shifted(model, 3):
        model(position_ids=torch.tensor([[0, 1]]), **{name: cache})
        cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
        model(position_ids=torch.tensor([[2]]), **{name: cache})
        for without in ({name: cache}, {"position_ids": torch.tensor([[2]])}):
            with pytest.raises(ValueError, match="can't shift positions: generate gave it no position_ids, or no cache"):
                model(**without)
    model(position_ids=torch.tensor([[3]]))
    assert seen == [[[0, 1]], [[5]], [[3]]]
