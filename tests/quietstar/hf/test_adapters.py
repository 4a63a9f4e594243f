"""Adapters in a live model: numbers and gradients are those of the merged model, and the base is unchanged."""

import copy
import logging
import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quietstar
from quietstar.config import AdapterConfig
from quietstar.hf import adapters

peft = pytest.importorskip("peft")
from tests.quietstar.common import assert_same_gradients, step, text  # noqa: E402
from tests.quietstar.hf import all_architectures as everything  # noqa: E402
from tests.quietstar.hf.lora_models import ALPHA, CONFIG, IDS, RANK, draw, gradients, lora, wrap  # noqa: E402


@pytest.fixture
def qs(base):
    return wrap(AutoModelForCausalLM.from_pretrained(base))


def merged(qs):
    """The same with the adapters merged, so that all weights of the language model have gradients."""
    twin = copy.deepcopy(qs)
    twin.merge_adapters()
    return twin


def test_losses_and_gradients_follow_from_the_merged_model(qs, monkeypatch):
    """In fp64: with W + s·B·A for W, dL/dB = s·G·Aᵀ and dL/dA = s·Bᵀ·G, where G is dL/dW of the merged model."""
    monkeypatch.setenv("QUIETSTAR_BACKEND", "reference")
    qs.double()
    truth, want = gradients(merged(qs))
    out, got = gradients(qs)
    assert torch.equal(out.thought_ids, truth.thought_ids) and truth.reward.abs().max() > 0.01
    for name in ("loss", "loss_ce", "policy_loss", "nll_base", "nll_mix", "weight", "reward"):
        torch.testing.assert_close(out[name], truth[name], rtol=1e-5, atol=1e-5)
    s, inner = ALPHA / RANK, dict(qs.model.get_base_model().named_modules())
    pairs = [name.removesuffix(".lora_A") for name in inner if name.endswith(".lora_A")]
    assert len(pairs) == 2 * 3
    for name in pairs:
        layer, G = inner[name], want[f"model.{name}.weight"]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for weight, expected in ((B, s * G @ A.T), (A, s * B.T @ G)):
            assert (weight.grad - expected).norm() <= 1e-5 * expected.norm(), name
    others = {name: x for name, x in got.items() if "lora_" not in name}
    assert_same_gradients(others, {name: x for name, x in want.items() if not name.startswith("model.")})


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(x, marks=pytest.mark.long) for x in ("gemma2", "phi3"))])
def test_other_architectures(tiny, name):
    """Soft caps and tied embeddings; transposed weights and learned positions; fused projections."""
    qs = wrap(tiny(name), target_modules="all-linear").eval()
    twin = merged(qs)
    assert any("lora_" in name for name in gradients(qs)[1])
    out, truth = qs(IDS, seed=4), twin(IDS, seed=4)
    assert torch.equal(out.thought_ids, truth.thought_ids)
    torch.testing.assert_close(out.nll_mix, truth.nll_mix, rtol=1e-4, atol=1e-4)


KINDS = {
    "magnitudes (DoRA)": lambda: lora(use_dora=True),
    "biases": lambda: lora(bias="all"),
    "whole embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "low-rank embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "some tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "factors (IA3)": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", [pytest.param(x, marks=() if "DoRA" in x else pytest.mark.long) for x in KINDS])
def test_other_kinds(tiny, tmp_path, kind):
    """They save and load bitwise, and merge without changing a number. A frozen base model stays the bare model's."""
    config = quietstar.ThoughtConfig(**{**CONFIG.to_dict(), "base_model": "frozen"})
    tiny("llama", attention_bias=True).save_pretrained(tmp_path / "base")
    qs = draw(quietstar.QuietStar(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config))
    frozen = qs(IDS, seed=4)
    qs.add_adapters(KINDS[kind]())
    trained = [weight for weight in qs.model.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in trained:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    out = qs(IDS, seed=4)
    out.loss.backward()
    assert trained and all(weight.grad is not None for weight in trained if weight.ndim > 1)
    # The losses that rewards compare with, summed over two tokens, are reward + nll_mix; they have not changed.
    base = [(x.reward[..., None] + x.nll_mix.sum(-1, keepdim=True))[:, :7, 0, 0] for x in (frozen, out)]
    torch.testing.assert_close(base[1], base[0], rtol=1e-4, atol=1e-4)
    assert (out.nll_base - frozen.nll_base).abs().max() > 0.01
    qs.save_pretrained(tmp_path / "adapters")
    again = quietstar.QuietStar.from_pretrained(tmp_path / "adapters")
    assert torch.equal(again(IDS, seed=4).loss, out.loss)
    qs.merge_adapters()
    torch.testing.assert_close(qs(IDS, seed=4).nll_mix, out.nll_mix, rtol=1e-4, atol=1e-4)


def test_adapters_of_a_shared_weight_cannot_be_merged():
    qs = wrap(everything.tiny_model("zamba2"), target_modules="all-linear")
    with pytest.raises(ValueError, match="merge_adapters: layers that share a weight have adapters of their own"):
        qs.merge_adapters()


def test_generation_is_that_of_the_merged_model(qs):
    twin = merged(qs)
    for think in ("always", "never", 3.5):
        options = {"max_new_tokens": 5, "think": think, "eos_token_id": None}
        assert torch.equal(qs.generate(IDS, **options), twin.generate(IDS, **options)), think
    assert torch.equal(qs.think(IDS, seed=2).thought_ids, twin.think(IDS, seed=2).thought_ids)


@pytest.mark.parametrize("reentrant, chunk", [(False, 4), (True, None)])
def test_layers_computed_again_change_no_gradient(qs, reentrant, chunk):
    _, want = gradients(qs.train())
    qs.gradient_checkpointing_enable({"use_reentrant": reentrant})
    qs.anchor_chunk = chunk
    _, got = gradients(qs)
    assert_same_gradients(got, want)


MORE_IDS = text(6, 16)  # of two texts the errors are too few to compare


def half_precision_error(model, truth, autocast):
    """Root mean squares of differences of fp32 values, and the relative difference of gradients outside the language model."""
    (exact, want), names = truth, ("nll_base", "nll_mix", "reward", "logprob")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, got = step(model, MORE_IDS, seed=4, thought_ids=exact.thought_ids)
    assert all(out[name].dtype == torch.float32 for name in out if name not in ("thought_ids", "dead", "leaks"))
    differences = {name: (out[name] - exact[name]).square().mean().sqrt().item() for name in names}
    rest = [name for name in want if not name.startswith("model.")]
    a, b = (torch.cat([gradient[name].flatten() for name in rest]) for gradient in (got, want))
    return differences | {"gradients": ((a - b).norm() / b.norm()).item()}


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_half_precision_keeps_rewards_and_log_probabilities_in_fp32(base, qs, half):
    """bf16 by autocast, and a bf16 base with fp32 adapters, are as accurate as the merged model under autocast."""
    twin = merged(qs)
    bound = half_precision_error(twin, step(twin, MORE_IDS, seed=4), autocast=True)
    truth, tried = step(qs, MORE_IDS, seed=4), qs
    if half == "weights":
        tried = wrap(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
        with torch.no_grad():
            for a, b in zip(tried.parameters(), qs.parameters(), strict=True):
                a.copy_(b)
        assert {weight.dtype for weight in tried.parameters() if weight.requires_grad} == {torch.float32}
    error = half_precision_error(tried, truth, autocast=half == "autocast")
    for name in error:
        assert 0 < error[name] < min(0.15, 2 * bound[name]), (name, error, bound)


def test_a_frozen_base_model_is_the_base_without_a_copy(tiny, base):
    """Reward and divergence compare with the predictions of a model that never had adapters."""
    config = quietstar.ThoughtConfig(
        **{**CONFIG.to_dict(), "base_model": "frozen", "kl_weight": 0.1, "policy_temperature": 1.0, "embedding_scale": 1.0}
    )
    qs = wrap(AutoModelForCausalLM.from_pretrained(base), config)
    out, got = gradients(qs)
    assert qs.base_model is None
    assert {name for name, weight in qs.named_parameters() if weight.requires_grad} == got.keys()
    logprob = tiny("llama")(IDS).logits.log_softmax(-1)
    nll = -logprob[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    assert (nll - out.nll_base).abs().max() > 0.01
    # Summed over the J = 2 tokens ahead; the last positions have no reward.
    places = torch.arange(7)[:, None] + torch.arange(2)
    gain = nll[:, places][:, :, None] - out.nll_mix[:, :7]
    torch.testing.assert_close(out.reward[:, :7], gain.sum(-1), rtol=1e-4, atol=1e-4)
    first = logprob[:, :7, None].expand(-1, -1, 2, -1).gather(3, out.thought_ids[:, :7, :, :1])[..., 0]
    torch.testing.assert_close(out.base_logprob[:, :7, :, 0], first, rtol=1e-4, atol=1e-4)


def test_an_averaged_base_model_has_its_own_weights_only_for_the_adapters(base, tmp_path):
    config = quietstar.ThoughtConfig(**{**CONFIG.to_dict(), "base_model": "ema", "base_model_decay": 0.75})
    qs = wrap(AutoModelForCausalLM.from_pretrained(base), config)
    began = {name: weight.clone() for name, weight in qs.base_model.named_parameters()}
    own = {name for name, weight in qs.base_model.named_parameters() if all(weight is not x for x in qs.model.parameters())}
    assert own and all("lora_" in name for name in own) and not any(w.requires_grad for w in qs.base_model.parameters())
    draw(qs, seed=2)
    qs.update_base_model()
    now = dict(qs.model.named_parameters())
    for name, weight in qs.base_model.named_parameters():
        torch.testing.assert_close(weight, 0.75 * began[name] + 0.25 * now[name] if name in own else now[name])
    assert gradients(qs)[0].reward.abs().max() > 0.01
    qs.save_pretrained(tmp_path / "ema")
    written = load_file(tmp_path / "ema" / "quietstar.safetensors")
    assert {name for name in written if name.startswith("base_model.")} == {f"base_model.{name}" for name in own}
    again = quietstar.QuietStar.from_pretrained(tmp_path / "ema")
    assert torch.equal(again(IDS, seed=4).reward, qs(IDS, seed=4).reward)


REFUSED = {
    "two adapters": (lambda model: model.add_adapter("second", lora()), "must have one adapter, called 'default'"),
    "an unfrozen base": (lambda model: model.get_base_model().model.norm.requires_grad_(True), "the base must be frozen"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_adapters_that_cannot_be_saved_without_the_base_are_refused(tiny, what):
    change, message = REFUSED[what]
    model = peft.get_peft_model(tiny("llama"), lora())
    qs = quietstar.QuietStar(model, CONFIG)
    change(model)
    with pytest.raises(ValueError, match=message):
        quietstar.QuietStar(model, CONFIG)
    with pytest.raises(ValueError, match=message):
        qs.save_pretrained("not-written")
    assert not os.path.exists("not-written")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: lora(target_modules=["lm_head"]), "must leave out the output head"),
        (lambda: lora(modules_to_save=["lm_head"]), "must leave out the output head"),
        (lambda: lora(init_lora_weights="pissa"), "init_lora_weights must leave the base unchanged, got 'pissa'"),
        (lambda: lora(target_modules=["nothing"]), "no adapters fit LlamaForCausalLM: Target modules"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "must change layers only, got PROMPT"),
        (lambda: AdapterConfig(lora_rank=2, lora_targets="nothing"), "no adapters fit LlamaForCausalLM"),
    ],
)
def test_adapters_that_thoughts_cannot_run_through_are_refused(tiny, config, message):
    qs = quietstar.QuietStar(tiny("llama"), CONFIG)
    want = qs(IDS, seed=4)
    with pytest.raises(ValueError, match=message):
        qs.add_adapters(config())
    assert not adapters.there(qs.model) and not any("lora" in name for name, _ in qs.named_parameters())
    assert torch.equal(qs(IDS, seed=4).loss, want.loss)


def test_our_short_form(tiny):
    qs = quietstar.QuietStar(tiny("llama"), CONFIG)
    qs.add_adapters(AdapterConfig(lora_rank=4, lora_targets="q_proj, v_proj", lora_dropout=0.1))
    made = qs.model.peft_config["default"]
    assert (made.r, made.lora_alpha, made.lora_dropout, made.target_modules) == (4, 8, 0.1, {"q_proj", "v_proj"})
    assert sum("lora_A" in name for name, _ in qs.named_parameters()) == 4
    for bad, message in (
        ({"lora_rank": -1}, "lora_rank must be 0 or more, got -1"),
        ({"lora_targets": "a,,b"}, "lora_targets must be names"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_dropout": 1}, "lora_dropout must be from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterConfig(**bad)


def test_existing_adapters_and_those_of_transformers_are_refused(qs, tiny):
    with pytest.raises(ValueError, match="already has adapters"):
        qs.add_adapters(AdapterConfig(lora_rank=2))
    model = tiny("llama")
    try:
        model.add_adapter(lora())
    except ValueError as error:
        pytest.skip(str(error))  # transformers wants a newer peft for adapters of its own
    with pytest.raises(ValueError, match="must come from peft.get_peft_model"):
        quietstar.QuietStar(model, CONFIG)


def test_without_peft(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[lora\]'"):
        quietstar.QuietStar(tiny("llama"), CONFIG).add_adapters(AdapterConfig(lora_rank=2))


def test_a_kernel_that_lora_does_not_use_is_not_missed():
    adapters.require_peft()
    log = logging.getLogger("bitsandbytes")
    assert log.isEnabledFor(logging.WARNING) and not log.getChild("backends.cpu.ops").isEnabledFor(logging.WARNING)
