"""LoRA through peft: numbers equal the merged model's, the base is unchanged, and adapters load only on their own base."""

import copy
import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quietstar
from quietstar.checkpoints import native as checkpoint
from quietstar.cli import main as cli
from quietstar.config import AdapterConfig, TrainConfig
from quietstar.hf import adapters
from quietstar.run import snapshots
from quietstar.train import train

peft = pytest.importorskip("peft")

CONFIG = quietstar.ThoughtConfig(thought_tokens=3, lookahead=2, policy_weight=5.0, embedding_scale=1.0)
RANK, ALPHA = 3, 6.0
IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(0))


def lora(**changes):
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**settings, **changes})


def draw(qs, seed=1):
    """Random weights, as after training: new adapters change nothing, and a new mixing head outputs 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in qs.named_parameters():
            if name == "mixing_head.4.weight" or ("lora_B" in name and name.startswith("model.")):
                weight.normal_(0, 0.2, generator=generator)
    return qs


def wrap(model, config=CONFIG, **changes):
    torch.manual_seed(0)
    return draw(quietstar.QuietStar(peft.get_peft_model(model, lora(**changes)), config))


@pytest.fixture
def base(tiny, tmp_path):
    """The folder of a base model."""
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def qs(base):
    return wrap(AutoModelForCausalLM.from_pretrained(base))


@pytest.fixture
def saved(qs, tmp_path):
    qs.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def merged(qs):
    """The same with the adapters merged, so that all weights of the language model have gradients."""
    twin = copy.deepcopy(qs)
    twin.merge_adapters()
    return twin


def gradients(qs, **options):
    qs.zero_grad()
    out = qs(IDS, seed=4, **options)
    out.loss.backward()
    return out, {name: weight.grad for name, weight in qs.named_parameters() if weight.grad is not None}


def test_new_adapters_change_no_number(tiny):
    bare = quietstar.QuietStar(tiny("llama"), CONFIG)
    before = bare(IDS, seed=4)
    bare.add_adapters(lora())
    after = bare(IDS, seed=4)
    assert all(torch.equal(before[name], after[name]) for name in before)


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
    others = {name for name in got if "lora_" not in name}
    assert others == {name for name in want if not name.startswith("model.")}
    for name in others:
        assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm(), name


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phi3"])
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


@pytest.mark.parametrize("kind", list(KINDS))
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


def test_generation_is_that_of_the_merged_model(qs):
    twin = merged(qs)
    for think in ("always", "never", 3.5):
        options = {"max_new_tokens": 5, "think": think, "eos_token_id": None}
        assert torch.equal(qs.generate(IDS, **options), twin.generate(IDS, **options)), think
    assert torch.equal(qs.think(IDS, seed=2).thought_ids, twin.think(IDS, seed=2).thought_ids)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_layers_computed_again_change_no_gradient(qs, reentrant, chunk):
    qs.train()
    _, want = gradients(qs)
    qs.gradient_checkpointing_enable({"use_reentrant": reentrant})
    qs.anchor_chunk = chunk
    if chunk and reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            gradients(qs)
        return
    _, got = gradients(qs)
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm(), name


def half_precision_error(model, truth, autocast):
    """Largest differences of fp32 values, and the relative difference of gradients outside the language model."""
    (exact, want), names = truth, ("nll_base", "nll_mix", "reward", "logprob")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, got = gradients(model, thought_ids=exact.thought_ids)
    assert all(out[name].dtype == torch.float32 for name in out if name != "thought_ids")
    differences = {name: (out[name] - exact[name]).abs().max().item() for name in names}
    rest = [name for name in want if not name.startswith("model.")]
    a, b = (torch.cat([gradient[name].flatten() for name in rest]) for gradient in (got, want))
    return differences | {"gradients": ((a - b).norm() / b.norm()).item()}


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_half_precision_keeps_rewards_and_log_probabilities_in_fp32(base, qs, half):
    """bf16 by autocast, and a bf16 base with fp32 adapters, are as accurate as the merged model under autocast."""
    twin = merged(qs)
    bound = half_precision_error(twin, gradients(twin), autocast=True)
    truth, tried = gradients(qs), qs
    if half == "weights":
        tried = wrap(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
        with torch.no_grad():
            for a, b in zip(tried.parameters(), qs.parameters(), strict=True):
                a.copy_(b)
        assert {weight.dtype for weight in tried.parameters() if weight.requires_grad} == {torch.float32}
    error = half_precision_error(tried, truth, autocast=half == "autocast")
    for name in error:
        assert 0 < error[name] < min(0.15, 2 * bound[name]), (name, error, bound)


def test_a_checkpoint_holds_adapters_alone_and_loads_bitwise(qs, saved, base):
    assert sorted(os.listdir(saved)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "quietstar.json",
        "quietstar.safetensors",
    ]
    trained = sum(weight.nbytes for name, weight in qs.named_parameters() if "lora_" in name)
    assert trained < (saved / "adapter_model.safetensors").stat().st_size < trained + 4096
    assert str(base) in (saved / "README.md").read_text()
    again = quietstar.QuietStar.from_pretrained(saved)
    first, second = gradients(qs), gradients(again)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_adapters_load_onto_a_base_at_hand_and_in_another_dtype(qs, saved, base, tiny):
    want = qs(IDS, seed=4)
    got = quietstar.QuietStar.from_pretrained(saved, base=tiny("llama"))(IDS, seed=4)
    assert torch.equal(got.loss, want.loss)
    for dtype in (torch.bfloat16, torch.float16):
        half = quietstar.QuietStar.from_pretrained(saved, base=str(base), dtype=dtype)
        out = half(IDS, thought_ids=want.thought_ids)
        assert half.model.dtype == dtype and (out.nll_mix - want.nll_mix).abs().max() < 0.15


def test_adapters_of_another_base_are_refused(saved, tiny, tmp_path):
    with pytest.raises(ValueError, match="belong to another base: the weights of LlamaForCausalLM have other values"):
        quietstar.QuietStar.from_pretrained(saved, base=tiny("llama", seed=1))
    with pytest.raises(ValueError, match="belong to another base: the layers of LlamaForCausalLM have other names or shapes"):
        quietstar.QuietStar.from_pretrained(saved, base=tiny("llama", num_hidden_layers=1))
    with pytest.raises(ValueError, match="belong to another base: the layers of GPT2LMHeadModel"):
        quietstar.QuietStar.from_pretrained(saved, base=tiny("gpt2"))
    with pytest.raises(ValueError, match=r"base .*nowhere does not load \(base= takes another\)"):
        quietstar.QuietStar.from_pretrained(saved, base=str(tmp_path / "nowhere"))
    fine_tuned = tiny("llama")
    with torch.no_grad():
        for weight in fine_tuned.parameters():
            weight.mul_(1.002)
    with pytest.raises(ValueError, match="have other values"):
        quietstar.QuietStar.from_pretrained(saved, base=fine_tuned)
    assert not adapters.there(fine_tuned)


def test_checkpoints_that_name_no_base_or_need_none(tiny, tmp_path):
    wrap(tiny("llama")).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="don't name their base"):
        quietstar.QuietStar.from_pretrained(tmp_path / "a")
    quietstar.QuietStar(tiny("llama"), CONFIG).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="base is for a checkpoint of adapters"):
        quietstar.QuietStar.from_pretrained(tmp_path / "b", base=tiny("llama"))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "quietstar.safetensors"])
def test_a_damaged_or_missing_file_is_named(saved, file):
    whole = (saved / file).read_bytes()
    (saved / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{saved}: {file} is damaged"):
        quietstar.QuietStar.from_pretrained(saved)
    (saved / file).unlink()
    with pytest.raises(ValueError, match=f"{saved}: {file} is missing"):
        quietstar.QuietStar.from_pretrained(saved)


def test_files_of_other_adapters_are_refused(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(ValueError, match="adapter_model.safetensors and adapter_config.json are not of the same adapters"):
        quietstar.QuietStar.from_pretrained(saved)


def test_a_merged_model_is_an_ordinary_checkpoint(qs, tmp_path):
    want = qs(IDS, seed=4)
    qs.merge_adapters()
    qs.save_pretrained(tmp_path / "merged")
    again = quietstar.QuietStar.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(IDS, seed=4).nll_mix, want.nll_mix, rtol=1e-4, atol=1e-4)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(alone(IDS).logits, again.model(IDS).logits) and not adapters.there(alone)
    assert all(weight.requires_grad for weight in again.parameters())
    with pytest.raises(ValueError, match="merge_adapters: the model has no adapters"):
        again.merge_adapters()


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


def test_existing_adapters_and_those_of_transformers_are_refused(qs, tiny):
    with pytest.raises(ValueError, match="already has adapters"):
        qs.add_adapters(AdapterConfig(lora_rank=2))
    model = tiny("llama")
    model.add_adapter(lora())
    with pytest.raises(ValueError, match="must come from peft.get_peft_model"):
        quietstar.QuietStar(model, CONFIG)


def test_the_published_format_has_no_adapters(tiny, tmp_path):
    with pytest.raises(ValueError, match="knows no adapters"):
        wrap(tiny("mistral")).save_official(tmp_path / "official")
    assert not (tmp_path / "official").exists()


def test_without_peft(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'quietstar-kernels\[lora\]'"):
        quietstar.QuietStar(tiny("llama"), CONFIG).add_adapters(AdapterConfig(lora_rank=2))


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


DATA = [{"input_ids": torch.randint(3, 61, (7 + i % 3,), generator=torch.Generator().manual_seed(i))} for i in range(5)]


def train_some(base, out, resume=None, rank=RANK, whole=False):
    torch.manual_seed(0)
    qs = quietstar.QuietStar(AutoModelForCausalLM.from_pretrained(base), CONFIG)
    if not whole:
        qs.add_adapters(lora(r=rank, lora_dropout=0.2))
    settings = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup": 1, "save_every": 2}
    return qs, train(qs, DATA, TrainConfig(out=str(out), **settings), resume=resume, progress=False)


def test_a_resumed_run_gives_the_losses_of_an_unbroken_one_bitwise(base, tmp_path):
    qs, unbroken = train_some(base, tmp_path / "run")
    began = AutoModelForCausalLM.from_pretrained(base).state_dict()
    frozen = adapters._base_matrices(qs.model)
    assert set(frozen) < set(began) and all(torch.equal(weight, began[name]) for name, weight in frozen.items())
    newest, half_way = snapshots.folder(tmp_path / "run", 4), snapshots.folder(tmp_path / "run", 2)
    assert not (newest / "model.safetensors").exists()
    assert "adapter_model.safetensors" in json.loads((newest / "manifest.json").read_text())
    again, resumed = train_some(base, tmp_path / "run", resume=half_way)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in unbroken]
    assert all(torch.equal(a, b) for a, b in zip(qs.parameters(), again.parameters(), strict=True))
    loaded = quietstar.QuietStar.from_pretrained(newest)
    assert torch.equal(loaded.eval()(IDS).loss, qs.eval()(IDS).loss)


def test_a_run_does_not_continue_with_other_adapters(base, tiny, tmp_path):
    train_some(base, tmp_path / "run")
    with pytest.raises(ValueError, match="its adapters were made with r=3, not 2"):
        train_some(base, tmp_path / "run", resume="auto", rank=2)
    with pytest.raises(ValueError, match="it holds adapters alone, and this run trains a whole model"):
        train_some(base, tmp_path / "run", resume="auto", whole=True)
    tiny("llama", seed=5).save_pretrained(tmp_path / "another")
    with pytest.raises(ValueError, match="belong to another base: the weights of"):
        train_some(tmp_path / "another", tmp_path / "run", resume="auto")
    qs, _ = train_some(base, tmp_path / "whole", whole=True)
    qs.add_adapters(lora())
    with pytest.raises(ValueError, match="it holds a whole model, and this run trains adapters alone"):
        checkpoint.restore_all(qs.contents(), snapshots.folder(tmp_path / "whole", 4))


def test_the_command_line(tiny, base, byte_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer.save_pretrained(base)
    tiny("llama", vocab_size=257).save_pretrained(base)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(20)))
    small = [
        "--length=16",
        "--steps=2",
        "--batch-size=2",
        "--thoughts=2",
        "--thought-tokens=2",
        "--lookahead=2",
        "--held-out=0",
    ]
    options = ["train", "--model=base", "--data=text.txt", "--out=run", "--lora-rank=2", "--lora-targets=q_proj,v_proj", *small]
    assert cli.main(options) == 0
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    assert cli.main([*options, "--resume", "--lora-rank=3"]) == cli.DATA
    assert "the run there has lora_rank=2, not 3" in capsys.readouterr().err
    assert cli.main([*options, "--resume"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the base is found from another folder
    assert cli.main(["generate", "--model=../run", "--prompt=Hello", "--max-new-tokens=3"]) == 0
    compiled = []
    monkeypatch.setattr(quietstar.QuietStar, "compile", lambda qs: compiled.append(qs))
    more = ["train", "--model=../run", "--data=../text.txt", "--out=more", "--compile", *small]
    assert cli.main([*more, "--gradient-checkpointing", "--optimizer=fused"]) == 0
    assert len(compiled) == 1 and adapters.there(compiled[0].model)
    assert cli.main(["train", "--model=../run", "--data=../text.txt", "--out=else", "--lora-rank=2", *small]) == cli.DATA
    assert "already has adapters" in capsys.readouterr().err
