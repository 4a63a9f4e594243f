"""The training loop, and supervised training on completions."""

import pytest
import torch

from quietstar_recipes.common.logprobs import logprob
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.training import SFTConfig, adamw, sft, token_batches, train
from quietstar_recipes.tasks import Addition
from tests.recipes.conftest import one_by_one, seeded


@pytest.mark.parametrize("scale", [1.0, float("inf")])
def test_a_step_is_clipped_and_none_is_taken_on_a_gradient_that_is_not_finite(scale):
    module, lines = torch.nn.Linear(2, 1, bias=False), []
    before = module.weight.detach().clone()

    def gradient(step):
        module.weight.grad = torch.tensor([[3.0, 4.0]]) * scale
        return {"loss": 1.0}

    optimizer = adamw(module, 0.1, 0.0)
    if scale == 1:
        train(module, optimizer, 1, gradient, name="score", after=lines.append)
        assert lines[0]["grad_norm"] == pytest.approx(5)
        torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8]]))
    else:
        with pytest.raises(FloatingPointError, match="score: the norm of the gradient is (nan|inf) at step 1"):
            train(module, optimizer, 1, gradient, name="score")
        assert torch.equal(module.weight, before)


def test_only_trainable_parameters_are_optimized():
    module = torch.nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    (group,) = adamw(module, 0.1, 0.01).param_groups
    assert group["params"] == [module.weight] and (group["lr"], group["weight_decay"]) == (0.1, 0.01)


def examples_of(count):
    task = Addition(1)
    return task, [(row.prompt_ids, task.completion_ids(row)) for row in task.sample(count, "train", seeded(0))]


def test_the_loss_is_only_on_completions():
    task, examples = examples_of(4)
    model = small_model(task, width=32, heads=2, positions=32)
    lines = []
    expected = [x for prompt, completion in examples for x in one_by_one(model, prompt, completion)]
    sft(model, examples, 1, SFTConfig(batch_tokens=1000), log=lines.append)
    # A batch may repeat the examples, but only all four equally often.
    assert lines[0]["tokens"] % sum(len(x) for _, x in examples) == 0
    assert lines[0]["loss"] == pytest.approx(-sum(expected) / len(expected), abs=1e-5)


def test_training_learns_and_is_reproducible():
    task, examples = examples_of(20)
    losses = []
    for _ in range(2):
        model = small_model(task, width=32, heads=2, positions=32)
        lines = []
        sft(model, examples, 40, SFTConfig(learning_rate=1e-2, warmup=5, batch_tokens=120), seed=3, log=lines.append)
        losses.append([line["loss"] for line in lines])
    assert losses[0] == losses[1] and losses[0][-1] < 0.6 * losses[0][0]
    assert [line["learning_rate"] for line in lines[:6]] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-2])


def test_adapters_are_merged_into_the_model(tiny):
    task, examples = examples_of(20)
    model = tiny("llama", vocab_size=len(task.tokenizer))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    lines = []
    trained = sft(model, examples, 15, SFTConfig(learning_rate=1e-2, warmup=1, batch_tokens=200, lora_rank=2), log=lines.append)
    assert trained is model and lines[-1]["loss"] < lines[0]["loss"]
    after = model.state_dict()
    assert list(after) == list(before)
    ranks = {name: int(torch.linalg.matrix_rank(after[name] - x, atol=1e-5)) for name, x in before.items() if x.ndim == 2}
    assert {rank for name, rank in ranks.items() if "proj" in name} == {2}
    assert {rank for name, rank in ranks.items() if "proj" not in name} == {0}
    with torch.no_grad():
        values, mask = logprob(model, *map(list, zip(*examples, strict=True)))
    assert -values.sum() / mask.sum() < lines[0]["loss"]


def test_batches_are_filled_by_tokens():
    lengths = [3, 9, 4, 4, 7, 30, 2]
    batches = token_batches(lengths, 20, seed=0)
    seen = []
    while len(seen) < 3 * len(lengths):
        batch = next(batches)
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 20
        seen += batch
    for epoch in range(2):  # a batch may extend into the next epoch, but no example is left out
        assert sorted(seen[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]
