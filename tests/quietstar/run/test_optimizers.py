"""Optimizers by name: the same steps as AdamW's, and states that come back from plain tensors."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load, save

from quietstar.config import OPTIMIZERS
from quietstar.run.optimizers import from_tensors, make_optimizer, to_tensors

HERE = [name for name in OPTIMIZERS if name != "8bit" or find_spec("bitsandbytes")]


def weights():
    """The second is large enough for moments of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((5,), (64, 80))]


def steps(optimizer, parameters, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for weight in parameters:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", HERE)
def test_steps_are_those_of_adamw(name):
    """The formulas in fp64; 8 bits may be off by a fifth of the way that AdamW goes."""
    tried, truth = weights(), [weight.detach().double() for weight in weights()]
    steps(make_optimizer(name, tried, learning_rate=0.01, weight_decay=0.1), tried, 4, seed=1)
    generator = torch.Generator().manual_seed(1)
    means, squares = [0.0] * 2, [0.0] * 2
    for step in range(1, 5):
        for i in range(2):
            grad = torch.randn(truth[i].shape, generator=generator).double()
            means[i] = 0.9 * means[i] + 0.1 * grad
            squares[i] = 0.999 * squares[i] + 0.001 * grad**2
            way = (means[i] / (1 - 0.9**step)) / ((squares[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            truth[i] = truth[i] * (1 - 0.01 * 0.1) - 0.01 * way
    way = truth[1] - weights()[1].detach()
    bound = 0.2 if name == "8bit" else 1e-5
    assert (tried[1].detach() - truth[1]).norm() <= bound * way.norm()
    torch.testing.assert_close(tried[0].detach().double(), truth[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_a_state_comes_back_from_tensors(name):
    """Through safetensors and json; both continue bitwise alike."""
    first = weights()
    optimizer = make_optimizer(name, first, learning_rate=0.01, weight_decay=0.1)
    steps(optimizer, first, 2, seed=1)
    state = optimizer.state_dict()
    tensors = load(save({key: value.contiguous() for key, value in to_tensors(state["state"]).items()}))
    second = [torch.nn.Parameter(weight.detach().clone()) for weight in first]
    again = make_optimizer(name, second, learning_rate=0.01, weight_decay=0.1)
    again.load_state_dict({"state": from_tensors(tensors), "param_groups": json.loads(json.dumps(state["param_groups"]))})
    for parameters, one in ((first, optimizer), (second, again)):
        steps(one, parameters, 2, seed=2)
    for a, b, old in zip(first, second, weights(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, old)


def test_nested_states_and_whole_numbers():
    """As bitsandbytes keeps them."""
    codes = torch.arange(4, dtype=torch.uint8)
    state = {
        0: {"step": 3, "quantised": {"state1": codes, "map": (table := torch.ones(2)), "deeper": {"n": 7}}},
        11: {"step": torch.tensor(2.0), "quantised": {"map": table}},
    }
    back = from_tensors(load(save(to_tensors(state))))
    assert torch.equal(back[0]["quantised"]["map"], table) and torch.equal(back[11]["quantised"]["map"], table)
    assert back[0]["step"] == 3 and type(back[0]["step"]) is int and back[0]["quantised"]["deeper"] == {"n": 7}
    assert torch.equal(back[0]["quantised"]["state1"], codes) and torch.equal(back[11]["step"], torch.tensor(2.0))
