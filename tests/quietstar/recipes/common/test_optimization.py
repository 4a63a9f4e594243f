"""One clipped optimizer step."""

import pytest
import torch

from quietstar.recipes.common.optimization import adamw, clipped_step


def test_a_step_returns_the_norm_before_clipping():
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clipped_step(adamw(module, 0.1, 0.0), module, 1.0, "score: update 1") == pytest.approx(5)
    torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_a_gradient_that_is_not_finite_changes_nothing():
    module = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in module.parameters()]
    (module(torch.ones(1, 2)) * float("inf")).sum().backward()
    with pytest.raises(FloatingPointError, match="score: update 3: the norm of the gradient is (nan|inf)"):
        clipped_step(adamw(module, 0.1, 0.0), module, 1.0, "score: update 3")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_only_trainable_parameters_are_optimized():
    module = torch.nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    (group,) = adamw(module, 0.1, 0.01).param_groups
    assert group["params"] == [module.weight] and (group["lr"], group["weight_decay"]) == (0.1, 0.01)
