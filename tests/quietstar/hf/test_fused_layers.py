"""Fused layers against transformers' own, in every pass; and what keeps a part of a layer from being fused."""

import copy
import json
import pickle
import sys

import pytest
import torch
from torch import nn

from quietstar import QuietStar, ThoughtConfig
from quietstar.hf import decoder, merged_weights
from quietstar.hf.attention import WRAPPED_NAME
from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.fused_layers import FAMILIES, FusedLayer, fuse_layers
from quietstar_kernels import ThoughtLayout
from tests.quietstar.common import assert_same_gradients, step, text

LAYOUT = ThoughtLayout.at(torch.tensor([[1, 4, 7], [0, 8, -1]]), 2, 3, text_length=9)
NAMES = [{"Gemma3": "gemma3_text"}.get(family, family.lower()) for family in FAMILIES]
CONFIG = ThoughtConfig(thoughts=2, thought_tokens=3, lookahead=2, policy_weight=1.0)


def both(tiny, name, dtype=torch.float32):
    """A model as transformers made it, and a fused copy."""
    plain = tiny(name, attention_bias=True).to(dtype)
    plain.set_attn_implementation(WRAPPED_NAME)
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype) / 8)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    assert all(isinstance(layer, FusedLayer) for layer in fused.model.layers)
    return plain, fused


def run_layers(model, dtype):
    """What two layers make of the same rows, and all gradients."""
    embeds = torch.randn(2, LAYOUT.M, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    out = decode_rows(model, embeds, LAYOUT.position_ids(), PackedPass(LAYOUT))
    out = out[:, : LAYOUT.L + 6]  # rows of unused anchors are nobody's
    grads = torch.autograd.grad(out.double().square().mean(), [embeds, *model.model.layers.parameters()])
    return out.double(), [grad.double() for grad in grads]


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_of_each_family(tiny, name):
    """The result and every gradient err at most twice as much as transformers' own, and 8 ulps."""
    plain, fused = both(tiny, name)
    truth, wanted = run_layers(copy.deepcopy(plain).double(), torch.float64)
    (own, owned), (got, grads) = (run_layers(model, torch.float32) for model in (plain, fused))
    for a, b, c in zip([got, *grads], [own, *owned], [truth, *wanted], strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 8 * torch.finfo(torch.float32).eps * c.norm()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_in_16_bits_they_are_as_accurate(tiny, name):
    plain, fused = both(tiny, name, torch.bfloat16)
    truth, wanted = run_layers(copy.deepcopy(plain).double(), torch.float64)
    (own, owned), (got, grads) = (run_layers(model, torch.bfloat16) for model in (plain, fused))
    assert (got - truth).norm() <= 2 * (own - truth).norm()
    total = [sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True)).sqrt() for found in (grads, owned)]
    assert total[0] <= 2 * total[1]


def unfused(monkeypatch, make):
    with monkeypatch.context() as patch:
        patch.setattr("quietstar.model.fuse_layers", lambda model: None)
        return make()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_rollouts_steps_and_generation(tiny, monkeypatch, name):
    """The same thoughts, loss and tokens; a rollout after an update is one of the new weights."""

    def make():
        return QuietStar(tiny(name), CONFIG, verify=False).train()

    for qs in (twins := [unfused(monkeypatch, make), make()]):
        qs(text(), seed=1).loss.backward()
        torch.optim.SGD(qs.parameters(), 0.01).step()
    thoughts = [qs.think(text(), seed=3) for qs in twins]
    assert torch.equal(*(x.thought_ids for x in thoughts))
    torch.testing.assert_close(*(x.logprob for x in thoughts), rtol=1e-5, atol=1e-5)
    (want, wanted), (out, got) = (step(qs, text(), thought_ids=thoughts[0].thought_ids) for qs in twins)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=0)
    assert_same_gradients(got, wanted, 1e-4)
    new = [qs.eval().generate(text(), max_new_tokens=4, think="always", eos_token_id=None) for qs in twins]
    assert torch.equal(*new)


class Doubled(nn.Linear):
    """As quantized layers are: a class of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def adapt(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))


def hook(layer, name, hooked):
    return lambda model: model.model.layers[layer].get_submodule(name).register_forward_hook(hooked)


def doubled(module, inputs, output):
    return 2 * output


CHANGES = {
    "adapters": adapt,
    "a class of its own": lambda model: setattr(model.model.layers[0].mlp.up_proj, "__class__", Doubled),
    "a hook of a product": hook(0, "self_attn.v_proj", doubled),
    "a hook of attention": lambda model: model.model.layers[0].self_attn.register_forward_hook(
        lambda m, x, y: (2 * y[0], None)
    ),
    "a hook of the MLP": hook(1, "mlp", doubled),
    "a hook of a norm": hook(1, "input_layernorm", doubled),
    "a hook of the layer": hook(0, "", doubled),
    "a norm's kernel": lambda model: setattr(model.model.layers[0].input_layernorm, "forward", lambda x: 3 * x),
    "the activation": lambda model: setattr(model.model.layers[0].mlp.act_fn, "forward", torch.sigmoid),
    "heads of a norm": hook(0, "self_attn.q_norm", doubled),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_have_changed_runs_as_it_is(tiny, monkeypatch, change):
    def make():
        torch.manual_seed(0)
        qs = QuietStar(tiny("qwen3"), CONFIG, verify=False)
        before = qs.think(text(), seed=3).logprob
        CHANGES[change](qs.model)
        return qs, before

    (plain, before), (fused, _) = unfused(monkeypatch, make), make()
    want, got = (qs.think(text(), seed=3) for qs in (plain, fused))
    assert torch.equal(got.thought_ids, want.thought_ids) and (want.logprob - before).abs().max() > 1e-2
    torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-5, atol=1e-5)
    losses = [qs.train()(text(), thought_ids=want.thought_ids).loss for qs in (plain, fused)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_products_stand_side_by_side_while_the_model_is_small(tiny, monkeypatch):
    """The copies are of a rollout, and take as many bytes as the weights; adapters keep a group apart."""
    model, made = tiny("llama"), []
    qs = QuietStar(model, CONFIG, verify=False)
    monkeypatch.setattr(decoder, "merge", lambda *args: made.append(merged_weights.merge(*args)) or made[-1])
    qs.think(text(), seed=1)
    assert [weight.shape[0] for weight, _ in made[0].values()] == [128, 192] * 2
    adapt(model)
    qs.think(text(), seed=1)
    assert made[1] is None
    monkeypatch.setattr(merged_weights, "MOST", 1000)
    QuietStar(tiny("llama"), CONFIG, verify=False).think(text(), seed=1)
    assert made[2] is None


def test_a_fused_layer_passes_for_the_one_it_was(tiny):
    qs = QuietStar(tiny("llama"), CONFIG, verify=False)
    layer = qs.model.model.layers[0]
    kind = layer.unfused
    assert isinstance(layer, kind) and kind.__name__ == type(layer).__name__ == "LlamaDecoderLayer"
    assert isinstance(copy.deepcopy(qs.model).model.layers[0], FusedLayer)
    assert type(pickle.loads(pickle.dumps(layer))) is kind  # as a name says
    again = QuietStar(qs.model, CONFIG, verify=False)
    assert type(again.model.model.layers[0]) is type(layer)
    ids = text()
    assert torch.equal(qs.model(ids).logits, tiny("llama")(ids).logits)


KERNEL = """
import torch

calls = []

class Norm(torch.nn.Module):
    has_backward = can_torch_compile = True

    def forward(self, x):
        calls.append(len(x))
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
"""


def test_a_kernel_from_the_hub(tiny, tmp_path, monkeypatch):
    """What ``use_kernels`` does to a model, with a kernel of a folder: the norms are the kernel's, the rest is fused."""
    kernels = pytest.importorskip("kernels")
    folder = tmp_path / "build/torch-cpu"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from . import layers", encoding="utf-8")
    (folder / "layers.py").write_text(KERNEL, encoding="utf-8")
    metadata = {"id": "_norm_cpu_1", "name": "norm", "version": 1, "license": "apache-2.0", "python-depends": []}
    (folder / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}), encoding="utf-8")
    qs, model = QuietStar(tiny("llama"), CONFIG, verify=False), tiny("llama")
    monkeypatch.setattr(type(model.model.norm), "kernel_layer_name", "RMSNorm", raising=False)
    local = kernels.LocalLayerRepository(tmp_path, layer_name="Norm")
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": local}}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    kernelized = QuietStar(model, CONFIG, verify=False)
    kernel = next(module for name, module in sys.modules.items() if name.endswith("layers") and hasattr(module, "Norm"))
    before = len(kernel.calls)
    (want, wanted), (out, got) = (step(x.train(), text(), seed=1) for x in (qs, kernelized))
    assert torch.equal(out.thought_ids, want.thought_ids) and len(kernel.calls) > before
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=0)
    assert_same_gradients(got, wanted, 1e-4)
