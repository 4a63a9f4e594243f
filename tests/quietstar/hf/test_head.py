"""Output head and embeddings are those that the model has now: after added tokens, other layers, and merged adapters."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import quietstar
from quietstar import QuietStar, shared_logprobs
from quietstar_recipes.common.training import SFTConfig, completion_loss, sft
from tests.quietstar.common import wrap

FIELDS = {"thoughts": 2, "thought_tokens": 3, "lookahead": 2, "policy_weight": 1.0, "embedding_scale": 1.0}


def saved_loss(qs, ids, folder):
    """The loss, and that of what is saved and loaded."""
    qs.save_pretrained(folder)
    return [float(x.eval()(ids, seed=0).loss.detach()) for x in (qs, QuietStar.from_pretrained(folder, verify=False))]


def replaced_head(model):
    linear = torch.nn.Linear(64, 61, bias=False)
    model.set_output_embeddings(linear)


def shared_weight(model):
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


CHANGES = {
    "more tokens": lambda model: model.resize_token_embeddings(64),
    "fewer tokens": lambda model: model.resize_token_embeddings(60),
    "another head": replaced_head,
    "a tie": shared_weight,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_wrapping(tiny, tmp_path, tied, change):
    qs = wrap(tiny("llama", tie_word_embeddings=tied), **FIELDS).train()
    CHANGES[change](qs.model)
    head, V = qs.model.lm_head.weight, len(qs.model.get_input_embeddings().weight)
    ids = torch.randint(3, V, (2, 12))
    ids[:, 3] = V - 1
    optimizer, before = torch.optim.SGD(qs.parameters(), 0.1), head.detach().clone()
    qs(ids, seed=0).loss.backward()
    optimizer.step()
    assert head is qs.lm_head.linear.weight and not torch.equal(head, before)
    loss, again = saved_loss(qs, ids, tmp_path)
    assert again == loss
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, qs.model(ids).logits)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == (head is qs.model.model.embed_tokens.weight)


def test_a_head_is_looked_up_in_each_call(tiny):
    quietstar.register_attention("sdpa")
    model = tiny("llama")
    model.set_attn_implementation("quietstar")
    shared_logprobs(model, [[3, 4, 5]])
    model.resize_token_embeddings(70)
    (found,) = shared_logprobs(model, [[3, 69, 5]])
    truth = model(torch.tensor([[3, 69, 5]])).logits.log_softmax(-1)[0, [0, 1], [69, 5]]
    torch.testing.assert_close(found, truth)
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="LlamaForCausalLM: only the own weight of its output head is read"):
        shared_logprobs(peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"])), [[3, 69, 5]])


@pytest.mark.parametrize("base_model", ["frozen", "ema"])
def test_a_copy_from_before_the_tokens_is_refused(tiny, base_model):
    qs = wrap(tiny("llama"), base_model=base_model, **FIELDS)
    qs.model.resize_token_embeddings(64)
    ids = torch.randint(3, 61, (1, 12))
    with pytest.raises(ValueError, match="base_model: its copy has 61 tokens and the model 64: add tokens before, or to both"):
        qs(ids)
    qs.base_model.resize_token_embeddings(64)
    assert qs(ids).loss.isfinite()


def test_a_tokenizer_with_more_tokens_is_said(tiny, byte_tokenizer):
    with pytest.warns(UserWarning, match="the tokenizer has 257 tokens and the model rows for 61, so"):
        wrap(tiny("llama"), byte_tokenizer, embedding_init=5, **FIELDS)


def test_tokens_added_to_the_base_of_adapters_are_not_lost(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    qs = wrap(tiny("llama"), **FIELDS)
    qs.add_adapters(peft.LoraConfig(target_modules=["q_proj"]))
    qs.model.resize_token_embeddings(64)
    with pytest.raises(ValueError, match="the base had 61 tokens when it got its adapters and has 64 now"):
        qs.save_pretrained(tmp_path / "adapters")
    qs.merge_adapters()
    loss, again = saved_loss(qs, torch.randint(3, 64, (1, 12)), tmp_path / "merged")
    assert again == loss


TARGETS = {
    "all layers": {"target_modules": "all-linear"},
    "both, magnitudes": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "both, scaled": {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
@pytest.mark.parametrize("targets", TARGETS)
def test_merging_changes_no_number(tiny, tmp_path, targets):
    """Of a tied model; test_adapters.py has others."""
    peft = pytest.importorskip("peft")
    qs = wrap(tiny("llama", tie_word_embeddings=True), **FIELDS).eval()
    ids = torch.randint(3, 61, (2, 12))
    bare = qs.model(ids).logits
    qs.add_adapters(peft.LoraConfig(r=4, **TARGETS[targets]))
    with torch.no_grad():
        for weight in qs.model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
        want = qs.model(ids).logits
        qs.merge_adapters()
        with pytest.raises(ValueError, match="merge_adapters: the model has no adapters"):
            qs.merge_adapters()
        assert (want - bare).abs().max() > 0.1
        torch.testing.assert_close(qs.model(ids).logits, want, rtol=1e-4, atol=1e-4)
    loss, again = saved_loss(qs, ids, tmp_path)
    assert again == loss
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings == (again.lm_head.weight is again.model.embed_tokens.weight)
    assert again.config.tie_word_embeddings == (targets == "all layers")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_a_recipe_trains_a_tied_model_with_adapters_on_its_embeddings(tiny):
    pytest.importorskip("peft")
    model, examples = tiny("llama", tie_word_embeddings=True), [([3, 4], [5, 6, 7]), ([8], [9, 10])]
    prompts, completions = zip(*examples, strict=True)
    before = completion_loss(model, prompts, completions)
    losses = []
    config = SFTConfig(learning_rate=1e-2, warmup=0, lora_rank=8, lora_targets="q_proj,v_proj,embed_tokens")
    model = sft(model, examples, 20, config, log=lambda line: losses.append(line["loss"]))
    after = float(completion_loss(model, prompts, completions).detach())
    assert after < min(losses) + 0.05 < float(before.detach()) - 1
