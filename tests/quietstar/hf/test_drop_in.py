"""Drop-in attention: in plain PyTorch, in transformers through attn_implementation="quietstar", and under a stock Trainer."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, NemotronConfig, StableLmConfig

import quietstar
from quietstar.hf import attention
from quietstar_kernels import ThoughtLayout
from tests.quietstar.common import sequential_logits
from tests.quietstar.hf import all_architectures as everything

ROOT = Path(__file__).parents[3]
V = 96
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = LlamaConfig(**SIZES)
GEMMA2 = Gemma2Config(
    **SIZES, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0, final_logit_softcapping=5.0, query_pre_attn_scalar=8
)


@pytest.fixture(autouse=True)
def default_registration():
    """The registration is global: each test starts and ends with the default one."""
    quietstar.register_attention()
    yield
    quietstar.register_attention()


def make_model(config, attention="quietstar"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def packed_inputs(batch=2, text=10, thoughts=2, rows=3, anchors=(0, 4, 9)):
    layout = ThoughtLayout.at(torch.tensor([anchors] * batch), thoughts, rows, text_length=text)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (batch, layout.M), generator=generator)
    return layout, {"input_ids": ids, "position_ids": layout.position_ids(), "use_cache": False}


@pytest.mark.long
def test_example_runs():
    done = subprocess.run([sys.executable, ROOT / "examples" / "drop_in_attention.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rounding alone" in done.stdout


@pytest.mark.parametrize("config", [LLAMA, GEMMA2], ids=["llama", "gemma2"])
@pytest.mark.parametrize("without_layout", ["raise", "sdpa"])
def test_packed_equals_sequential(config, without_layout):
    quietstar.register_attention(without_layout)
    layout, inputs = packed_inputs()
    with torch.no_grad():
        got = make_model(config)(**inputs, thought_layout=layout).logits
        truth = sequential_logits(make_model(config, "eager"), layout, inputs["input_ids"])
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)
    plain = make_model(config, "eager")(**inputs).logits
    assert (plain - truth).abs().max() > 0.01, "a causal forward over the packed rows must show in this model"


def test_without_layout_raises_and_names_both_remedies():
    with pytest.raises(ValueError) as error:
        make_model(LLAMA)(torch.ones(1, 4, dtype=torch.long))
    assert "pass thought_layout=" in str(error.value)
    assert "register_attention(without_layout='sdpa')" in str(error.value)


@pytest.mark.parametrize("config, plain", [(LLAMA, "sdpa"), (GEMMA2, "eager")], ids=["llama", "gemma2"])
def test_without_layout_may_be_plain_attention(config, plain):
    quietstar.register_attention(without_layout="sdpa")
    model, truth = make_model(config), make_model(config, plain)
    ids = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    live = mask.bool()
    with torch.no_grad():
        for arguments in ({}, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
            got, want = (x(ids, **arguments).logits[live] for x in (model, truth))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        # Left padding, a cache that grows past Gemma's window, and both batched.
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), truth.generate(ids, **options))
    layout, inputs = packed_inputs()
    with torch.no_grad():
        assert model(**inputs, thought_layout=layout).logits.isfinite().all(), "thoughts still work beside plain calls"


@pytest.mark.parametrize("without_layout", ["raise", "sdpa"])
@pytest.mark.parametrize("config", [StableLmConfig, NemotronConfig], ids=["stablelm", "nemotron"])
def test_a_lost_layout_raises(config, without_layout):
    quietstar.register_attention(without_layout)
    layout, inputs = packed_inputs()
    model = make_model(config(**SIZES))
    with pytest.raises(ValueError, match="thought_layout was passed to the model but did not arrive at attention"):
        model(**inputs, thought_layout=layout)


def test_attention_dropout_warns_once():
    attention._warn_dropout.cache_clear()
    layout, inputs = packed_inputs()
    model = make_model(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = model(**inputs, thought_layout=layout).logits
        second = model(**inputs, thought_layout=layout).logits
    assert sum("attention dropout" in str(warning.message) for warning in caught) == 1
    assert torch.equal(first, second)


def test_prepared_mask_with_a_layout_raises():
    layout, inputs = packed_inputs()
    mask = torch.zeros(2, 1, layout.M, layout.M)
    with pytest.raises(ValueError, match=r"attention_mask must be None or \[B,M\], got a prepared mask tensor"):
        make_model(LLAMA)(**inputs, attention_mask=mask, thought_layout=layout)


@pytest.mark.long
def test_compiled_equals_eager():
    layout, inputs = packed_inputs()
    results = []
    for compiled in (False, True):
        model = make_model(LLAMA)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        logits = run(**inputs, thought_layout=layout).logits
        logits.log_softmax(-1)[..., 0].mean().backward()
        results.append([logits.detach()] + [p.grad for p in model.parameters()])
    for eager, got in zip(*results, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-5)
    other, inputs = packed_inputs(anchors=(1, 2, 8))
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(**inputs, thought_layout=other)


def test_without_layout_a_custom_mask_is_passed_on():
    quietstar.register_attention(without_layout="sdpa")
    model, truth = make_model(LLAMA), make_model(LLAMA, "sdpa")
    ids = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril().triu(-3)
    with torch.no_grad():
        got, want, causal = (x.logits for x in (model(ids, attention_mask=mask), truth(ids, attention_mask=mask), truth(ids)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, causal)


def fsdp2(model):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)  # its default casts the arguments of forwards
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def fsdp1(model):
    mixed = MixedPrecision(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    return FullyShardedDataParallel(model, mixed_precision=mixed, device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("shard", [fsdp1, fsdp2])
def test_sharded_in_mixed_precision(shard):
    layout, inputs = packed_inputs()
    want = make_model(LLAMA).bfloat16()(**inputs, thought_layout=layout).logits
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        got = shard(make_model(LLAMA))(**inputs, thought_layout=layout).logits
        got.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.3)


MIXES = "cannot think: it mixes positions outside attention"


@pytest.mark.parametrize("model_type", ["jamba", "minimax", "recurrent_gemma", "mamba", "xlstm"])
def test_hybrid_models_are_refused_with_a_layout_alone(model_type):
    """Some of these, of two layers, have no attention at all."""
    quietstar.register_attention(without_layout="sdpa")
    layout, inputs = packed_inputs(batch=1)
    inputs["input_ids"] = inputs["input_ids"] % 60
    model = everything.tiny_model(model_type)
    plain = model(**inputs).logits
    model.set_attn_implementation("quietstar")
    with pytest.raises(ValueError, match=f"model type '{model_type}' {MIXES}"):
        model(**inputs, thought_layout=layout)
    torch.testing.assert_close(model(**inputs).logits, plain)


def test_an_unknown_type_is_refused_by_its_layer_types():
    layout, inputs = packed_inputs()
    model = make_model(LLAMA)
    model.config.model_type, model.config.layer_types = "another", ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=f"model type 'another' {MIXES}"):
        model(**inputs, thought_layout=layout)
    with pytest.raises(ValueError, match=f"model type 'another' {MIXES}"):
        quietstar.verify(model)
