"""What is read once, in scoring, training and sampling, beside rows that repeat them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quietstar.hf.adapters import add
from quietstar.hf.layouts import layout_head, layouts_on
from quietstar_recipes.common import branches
from quietstar_recipes.common.logprobs import completion_logits, likelihoods, logprob
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.common.training import SFTConfig
from quietstar_recipes.tasks import WordProblems
from tests.quietstar.common import assert_same_gradients
from tests.quietstar.conftest import make_model
from tests.recipes.conftest import ALWAYS, counted


@pytest.fixture(scope="module")
def task():
    return WordProblems()


@pytest.fixture(params=["gpt2", "llama", "qwen3_5_text"])
def model(request, task):
    torch.manual_seed(0)
    V = len(task.tokenizer)
    if request.param == "gpt2":
        made = small_model(task, width=32, heads=2, positions=64)
    elif request.param == "qwen3_5_text":
        made = make_model("qwen3_5_text", vocab_size=V, hidden_size=32)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
        made = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_attention_heads=4, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        for name, x in made.named_parameters():
            if "norm" not in name and "ln_" not in name:
                x.normal_(0, 0.15)
    return made.eval()


def lists(V, *lengths):
    return [torch.randint(3, V, (n,)).tolist() for n in lengths]


def batch(V):
    """Unequal prompts, which repeat in any order or go on from completions, and unequal completions, one of them empty."""
    a, b, c, d = lists(V, 9, 5, 12, 1)
    first, second, *others = lists(V, 4, 7, 1, 0, 6, 3, 2)
    return [a, b, a, c, b + second[:5], b + second[:3], d], [first, second, *others]


def test_scores_and_gradients_are_the_same(model, both, task):
    prompts, completions = batch(len(task.tokenizer))
    weights = torch.randn(7, 7)

    def step():
        model.zero_grad()
        values, mask = logprob(model, prompts, completions)
        (values * weights).sum().backward()
        return (values.detach(), mask), {name: x.grad.clone() for name, x in model.named_parameters()}

    (rows, grads), (shared, shared_grads) = both(step)
    torch.testing.assert_close(rows, shared, atol=1e-5, rtol=1e-5)
    assert_same_gradients(shared_grads, grads)


def test_logits_are_the_same(model, both, task):
    prompts, completions = batch(len(task.tokenizer))

    def step():
        model.zero_grad()
        logits, _, mask = completion_logits(model, prompts, completions)
        logits = logits.where(pad(mask, (1, 0), value=True)[..., None], 0)
        logits.logsumexp(-1).sum().backward()
        return logits.detach(), [x.grad.clone() for x in model.parameters()]

    torch.testing.assert_close(*both(step), atol=1e-5, rtol=1e-5)


def test_adapters_are_trained_with_shared_prompts(model, both, task):
    pytest.importorskip("peft")
    trained = add(model, SFTConfig(lora_rank=2)).train()
    prompts, completions = batch(len(task.tokenizer))
    with torch.no_grad():
        for name, x in trained.named_parameters():
            if "lora_" in name:
                x.normal_(0, 0.3)

    def step():
        trained.zero_grad()
        values, _ = logprob(trained, prompts, completions)
        values.sum().backward()
        return values.detach(), {name: x.grad.clone() for name, x in trained.named_parameters() if x.requires_grad}

    (values, want), (shared, got) = both(step)
    torch.testing.assert_close(shared, values, atol=1e-5, rtol=1e-5)
    assert_same_gradients(got, want)


def test_a_forward_is_shared_where_it_saves_tokens(model, task, monkeypatch):
    calls = []
    monkeypatch.setattr(branches, "layouts_on", counted(layouts_on, calls))
    V = len(task.tokenizer)
    prompts, completions = lists(V, *[40] * 12), lists(V, *[6] * 12)
    logprob(model, prompts, completions)  # all different
    logprob(model, prompts[:1] * 6, completions[:6])  # too few tokens to gain from
    logprob(model, lists(V, 5) * 12, lists(V, *[40] * 12))  # short prompts
    assert not calls
    logprob(model, prompts[:1] * 12, completions)
    assert len(calls) == 1


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize("k, batch_size", [(5, 7), (1, 256)])
def test_samples_are_the_same(model, both, task, temperature, top_p, k, batch_size):
    a, b, c = lists(len(task.tokenizer), 9, 5, 9)
    ends = {a[0]}
    options = {"temperature": temperature, "top_p": top_p, "max_new": 12, "batch_size": batch_size, "ends": ends, "seed": 1}
    rows, shared = both(lambda: rollout(model, task, [a, b, a, c, a[:5] + b], k, **options))
    same(rows, shared)
    assert {len(several) for several in rows} == {k}
    assert k == 1 or not temperature or len({len(x.ids) for several in rows for x in several}) > 1  # some end early


def same(rows, shared):
    assert [[x.ids for x in several] for several in rows] == [[x.ids for x in several] for several in shared]
    for several, others in zip(rows, shared, strict=True):
        for x, y in zip(several, others, strict=True):
            torch.testing.assert_close(x.logprob, y.logprob, atol=1e-5, rtol=0)


@pytest.fixture
def letters():
    """What ``rollout`` reads of a task, with a token for each letter and completions that stop at "ab" and at most letters."""
    vocab = {letter: i for i, letter in enumerate("|abcdefgh")}
    made = Tokenizer(BPE(vocab, []))
    made.decoder = Fuse()  # without spaces
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="|")
    return SimpleNamespace(tokenizer=tokenizer, stop=("ab", *"cdefgh"), end_id=0)


@pytest.mark.parametrize("max_new", [1, 2, 20])
def test_stop_strings(model, both, letters, max_new):
    prompts = lists(len(letters.tokenizer), 6, 9)
    rows, shared = both(lambda: rollout(model, letters, prompts, 6, max_new=max_new))
    same(rows, shared)
    written = [x.ids for several in rows for x in several]
    if max_new == 20:  # only the end, which fills the row, follows a letter that stops
        assert any(ids[-2] > 2 for ids in written if len(ids) > 1)
        assert not any(2 < x < 9 for ids in written for x in ids[:-2])


def test_other_models_repeat_prompts(task, monkeypatch):
    """Models whose attention can't take a layout, and what a layout would change."""
    for name, value in ALWAYS.items():
        monkeypatch.setattr(branches, name, value)
    V = len(task.tokenizer)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    refused = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bloom"](**sizes)).eval()
    hooks = AutoModelForCausalLM.from_config(CONFIG_MAPPING["stablelm"](**sizes, num_key_value_heads=2, intermediate_size=32))
    dropout = small_model(task, width=32, heads=2, positions=64).train()
    dropout.transformer.h[0].attn.attn_dropout.p = 0.1
    half = small_model(task, width=32, heads=2, positions=64).bfloat16()
    eager = small_model(task, width=32, heads=2, positions=64)
    eager.set_attn_implementation("eager")
    checkpointed = small_model(task, width=32, heads=2, positions=64).train()
    checkpointed.gradient_checkpointing_enable()
    prompts, completions = batch(V)
    for model in (refused, hooks, dropout, half, eager, checkpointed):
        assert layout_head(model) is None
        values, mask = logprob(model, prompts, completions)
        assert values.shape == mask.shape == (7, 7)
        assert len(rollout(model, task, prompts, 2, max_new=3)[0]) == 2
        assert not any("quietstar" in key for layer in model.modules() for key in vars(layer))


def test_sampling_shares_long_prompts(model, task, monkeypatch):
    calls = []
    monkeypatch.setattr(branches, "prompts_once", counted(branches.prompts_once, calls))
    (prompt,) = lists(len(task.tokenizer), 40)
    rollout(model, task, [prompt], 2, max_new=8)
    assert not calls
    rollout(model, task, [prompt], 8, max_new=8)
    rollout(model, task, [prompt] * 8, max_new=8)
    rollout(model, task, [prompt + [i] for i in range(8)], max_new=8)
    assert len(calls) == 3


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before(model, both, task, training):
    model.train(training)
    prompts, completions = batch(len(task.tokenizer))
    ids = torch.tensor(lists(len(task.tokenizer), 12, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    kept, config = set(vars(model)), copy.deepcopy(model.config.to_dict())
    before = model(ids, attention_mask=mask).logits
    state = torch.get_rng_state()
    both(lambda: (likelihoods(model, prompts, completions), rollout(model, task, prompts, 2, max_new=4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa" and model.training is training
    assert set(vars(model)) == kept and model.config.to_dict() == config
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_the_model_is_as_before_an_error(model, task, monkeypatch):
    for name, value in ALWAYS.items():
        monkeypatch.setattr(branches, name, value)
    prompts = lists(len(task.tokenizer), 5) * 2

    def fails(*_):
        raise RuntimeError("no")

    handle = model.get_decoder().register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no"):
        rollout(model, task, prompts, 2, max_new=4)
    with pytest.raises(RuntimeError, match="no"):
        logprob(model, prompts, prompts)
    handle.remove()
    assert model.config._attn_implementation == "sdpa" and "forward" not in vars(model)
