"""docs/group-rl.md's stand-ins for the functions by which TRL and verl compute log-probabilities equal them."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

import trl.trainer.utils

from tests.quietstar.conftest import make_model

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/group-rl.md").read_text().partition("\n## Log-probabilities in TRL and verl\n")[2]
TRL, VERL = re.findall(r"^```py\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture
def fused_linear(monkeypatch):
    """verl's class, from its file alone: the package imports Ray and others."""
    verl = importlib.util.find_spec("verl")
    if verl is None:
        pytest.skip("verl is not installed; `pip install --no-deps verl==0.9.1`")
    name = "verl.utils.experimental.torch_functional"
    file = Path(verl.submodule_search_locations[0], *name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for package in ("verl", "verl.utils", "verl.utils.experimental"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)
    return module.FusedLinearForPPO


def assert_close(got, want, dtype):
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for x, y in zip(got, want, strict=True):
        assert (x.float() - y.float()).norm() <= bound * y.float().norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (10,)], ids=str)
def test_verl(fused_linear, shape, dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 32, generator=generator).to(dtype)
    weight = torch.randn(61, 32, generator=generator).mul(0.3).to(dtype)
    ids = torch.randint(61, shape, generator=generator)
    grads = torch.randn(2, *shape, generator=generator)

    def results():
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        outputs = fused_linear()(*inputs, ids, temperature)
        assert outputs[0].shape == outputs[1].shape == shape and outputs[0].dtype == torch.float32
        return *outputs, *torch.autograd.grad(outputs, inputs, [g.to(x.dtype) for x, g in zip(outputs, grads, strict=True)])

    want = results()
    exec(VERL, {})
    got = results()
    assert fused_linear.forward.__module__ != "verl.utils.experimental.torch_functional"
    assert_close(got, want, dtype)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("autocast", [False, True])
def test_trl(name, autocast, monkeypatch):
    """A soft cap, a scale; labels that don't count; outputs that stay with TRL's function."""
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", trl.trainer.utils._ChunkedLogProbFunction)
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)

    def results(outputs):
        model = make_model(name)
        trl.trainer.utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + out.entropy.square().sum()).backward()
        found = [getattr(out, field) for field in outputs]
        return [x.detach() for x in found] + [x.grad for x in model.parameters() if x.grad is not None]

    asked = ("log_probs", "entropy"), ("log_probs", "entropy", "mean_logits")
    want = list(map(results, asked))
    theirs = trl.trainer.utils._ChunkedLogProbFunction
    exec(TRL, {})
    assert trl.trainer.utils._ChunkedLogProbFunction is not theirs
    for got, expected in zip(map(results, asked), want, strict=True):
        assert_close(got, expected, torch.bfloat16 if autocast else torch.float32)
