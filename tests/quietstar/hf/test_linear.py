"""fast_linear: numbers and gradients of torch.nn.Linear, by oneDNN; what it leaves alone; training with it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import quietstar
from quietstar.hf.linear import FastLinear
from quietstar_kernels.cpu import products
from quietstar_kernels.testing import assert_close_as_plain
from tests.quietstar.common import short_run, texts_of

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Holds the sizes of each product that oneDNN is given; it is given all."""
    given = []
    right = products.onednn_linear
    monkeypatch.setattr(products, "library", lambda: "onednn")
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "onednn_linear", lambda x, *rest: given.append(tuple(x.shape)) or right(x, *rest))
    return given


def layers(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias), nn.Tanh(), nn.Linear(40, 16))


def gradients(model, x, run=lambda model, x: model(x)):
    x = x.clone().requires_grad_()
    out = run(model, x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", [(30,), (3, 2, 5), (0,), ()], ids=str)
def test_error_rule(shape, calls):
    plain = layers(bias=len(shape) < 3)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    quietstar.fast_linear(fast)
    x = torch.randn(*shape, 24)
    for got, want, truth in zip(gradients(fast, x), gradients(plain, x), gradients(exact, x.double()), strict=True):
        assert_close_as_plain(got, want, truth)
    assert len(calls) == 6 * (0 not in shape)
    assert list(fast.state_dict()) == list(plain.state_dict()) and str(fast).count("FastLinear") == 2


def test_copies_frozen_weights_checkpoints_and_adapters(calls):
    model = layers()
    quietstar.fast_linear(model)
    twin, x = copy.deepcopy(model), torch.randn(7, 24)
    nn.init.zeros_(twin[0].weight)
    want = gradients(model, x)
    assert not torch.equal(want[0], twin(x))
    model.zero_grad()
    again = gradients(model, x, lambda model, x: checkpoint(model, x, use_reentrant=False))
    assert all(map(torch.equal, again, want))
    model.zero_grad()
    model[0].weight.requires_grad_(False)
    calls.clear()
    assert all(map(torch.equal, gradients(model, x), [*want[:2], *want[3:]]))
    assert len(calls) == 2 + 3
    adapted = peft.get_peft_model(layers(), peft.LoraConfig(target_modules=["0"]))
    quietstar.fast_linear(adapted)
    assert [type(adapted.base_model.model[0].base_layer), type(adapted.base_model.model[2])] == [FastLinear, FastLinear]
    calls.clear()
    assert adapted(x).isfinite().all() and len(calls) == 4


def test_second_derivatives_are_pytorchs():
    x = torch.randn(5, 24, dtype=torch.float32, requires_grad=True)
    plain = layers()
    fast = copy.deepcopy(plain)
    quietstar.fast_linear(fast)
    found = []
    for model in (plain, fast):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *model.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_it_leaves_alone(calls):
    class Other(nn.Linear):
        pass

    plain = nn.Sequential(Other(24, 24), nn.Linear(24, 24))
    fast = copy.deepcopy(plain)
    quietstar.fast_linear(fast)
    assert [type(module) for module in fast] == [Other, FastLinear]
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x))
    assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))
    assert calls == []
    with pytest.raises(ValueError, match="fast_linear: model"):
        quietstar.fast_linear("model")


def test_training(tiny, tmp_path, calls):
    """The losses are those of a run without, but for rounding."""
    thoughts = quietstar.ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2, policy_weight=5.0, embedding_scale=1.0)
    lines = {}
    for fast in (False, True):
        qs = quietstar.QuietStar(tiny("llama", num_hidden_layers=1), thoughts, verify=False)
        calls.clear()
        lines[fast] = short_run(qs, texts_of([7, 8, 9, 10]), tmp_path / str(fast), None, steps=2, fast_linear=fast)
        kinds = {type(module) for module in qs.modules() if isinstance(module, nn.Linear)}
        assert kinds == ({FastLinear} if fast else {nn.Linear}) and len(calls) > (50 if fast else -1)
    for a, b in zip(lines[False], lines[True], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
