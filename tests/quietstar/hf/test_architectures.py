"""Thought rows of every listed architecture equal an ordinary forward over the text prefix and the thought."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

import quietstar
from quietstar.hf import decoder
from quietstar.hf.architectures import REFUSED, check_architecture
from quietstar.hf.decoder import PackedPass, TextPass, ThoughtStore, decode_rows, decode_step
from quietstar_kernels import ThoughtLayout
from tests.quietstar.common import sequential_logits
from tests.quietstar.conftest import ARCHITECTURES, FEW

TEXT, THOUGHTS, ROWS = 16, 2, 5
BOUND = 1e-4  # the largest difference of fp32 logits that this project accepts


def packed_logits(qs, packed, layout):
    hidden = decode_rows(qs.model, qs.model.get_input_embeddings()(packed), layout.position_ids(), PackedPass(layout))
    return qs.lm_head.logits(hidden)


def stepwise_logits(qs, packed, layout):
    """Of the thoughts."""
    embed, store = qs.model.get_input_embeddings(), ThoughtStore(layout)
    decode_rows(qs.model, embed(packed[:, :TEXT]), layout.text_position_ids(), TextPass(store))
    rows = packed[:, TEXT:].unflatten(1, (-1, ROWS))
    steps = [decode_step(qs.model, embed(rows[:, :, s]), store, s).unflatten(1, (layout.P, layout.N)) for s in range(ROWS)]
    return qs.lm_head.logits(torch.stack(steps, 3).flatten(1, 3))


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layout = ThoughtLayout.at(torch.tensor([[0, 3, 8, 9, 15]] * 2), THOUGHTS, ROWS, text_length=TEXT)
    return torch.randint(3, 61, (2, layout.M), generator=generator), layout


def plain(tiny, name):
    """The same weights in a model that was never wrapped, with its own eager attention."""
    model = tiny(name)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def test_packed_and_stepwise_rows_equal_sequential_decoding(tiny, architecture):
    packed, layout = case()
    qs = quietstar.QuietStar(tiny(architecture))
    truth = sequential_logits(plain(tiny, architecture), layout, packed)
    assert truth.std() > 0.05
    assert (packed_logits(qs, packed, layout) - truth).abs().max() <= BOUND
    assert (stepwise_logits(qs, packed, layout) - truth[:, TEXT:]).abs().max() <= BOUND
    assert (qs.model(input_ids=packed[:, :TEXT]).logits - truth[:, :TEXT]).abs().max() <= BOUND


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_gradients_equal_sequential_decoding(tiny, name):
    packed, layout = case(1)
    mixing = torch.randn(2, layout.M, 61, generator=torch.Generator().manual_seed(2))
    qs = quietstar.QuietStar(tiny(name))
    (packed_logits(qs, packed, layout) * mixing).sum().backward()
    unwrapped = plain(tiny, name)
    (sequential_logits(unwrapped, layout, packed) * mixing).sum().backward()
    for (parameter, got), truth in zip(qs.model.named_parameters(), unwrapped.parameters(), strict=True):
        assert (got.grad - truth.grad).norm() <= 1e-4 * truth.grad.norm(), parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_verify_passes_and_reports_what_it_compared(tiny, architecture, dtype):
    report = quietstar.verify(tiny(architecture).to(dtype))
    assert report.ok and "thoughts" in str(report)


ATTENTION, DECODE, POSITION_IDS = decoder.thought_attention, decoder.thought_decode, ThoughtLayout.position_ids


def sees_later_text(q, k, v, layout, **options):
    return ATTENTION(q, k, v, replace(layout, anchor=(layout.anchor + 1).clamp(max=layout.L - 1)), **options)


def sees_the_other_thought(q, k, v, layout, **options):
    if layout.P:  # else it is the prefill of the steps
        layout = ThoughtLayout(layout.anchor, layout.lo, layout.length.sum(2, keepdim=True).int(), 2 * layout.rows)
    return ATTENTION(q, k, v, layout, **options)


def text_sees_a_thought(q, k, v, layout, **options):
    L = layout.L
    if layout.P:
        k, v = (torch.cat([x[:, :, :3], x[:, :, L : L + 1], x[:, :, 4:]], 2) for x in (k, v))
    return ATTENTION(q, k, v, layout, **options)


def steps_see_later_text(q, k_text, v_text, k_own, v_own, layout, step, **options):
    layout = replace(layout, anchor=(layout.anchor + 1).clamp(max=layout.L - 1))
    return DECODE(q, k_text, v_text, k_own, v_own, layout, step, **options)


def one_position_late(layout):
    rows = torch.arange(layout.M) >= layout.L
    return POSITION_IDS(layout) + rows


WRONG = {
    "sees later text": (decoder, "thought_attention", sees_later_text),
    "sees the other thought": (decoder, "thought_attention", sees_the_other_thought),
    "text sees a thought": (decoder, "thought_attention", text_sees_a_thought),
    "steps see later text": (decoder, "thought_decode", steps_see_later_text),
    "one position late": (ThoughtLayout, "position_ids", one_position_late),
}


@torch.no_grad()
def sharp(model):
    """Rounding grows a thousandfold in it: attention is sharp, and one channel is much larger than the others."""
    for name, weight in model.named_parameters():
        if any(part in name for part in ("q_proj.weight", "k_proj.weight", "c_attn.weight")):
            weight *= 3
        elif any(part in name for part in ("o_proj.weight", "down_proj.weight")):
            weight[3] *= 300
        elif "c_proj.weight" in name:  # GPT-2's are transposed
            weight[:, 3] *= 300
    return model


AMPLIFYING = list(zip(["llama", "gpt2", "gemma2", "llama", "gpt2"], range(5), WRONG, strict=True))


@pytest.mark.parametrize("name, seed, wrong", AMPLIFYING)
def test_verify_accepts_models_that_amplify_rounding_and_finds_wrong_masks_in_them(tiny, monkeypatch, name, seed, wrong):
    model = sharp(tiny(name, seed, num_hidden_layers=6))
    report = quietstar.verify(model)
    assert report.ok
    monkeypatch.setattr(*WRONG[wrong])
    assert max(vars(quietstar.verify(model)).values()) > 100 * report.bound


IN_FP32 = [pytest.param(x, torch.float32, 1000, marks=() if x in FEW else pytest.mark.long) for x in ARCHITECTURES]
IN_BF16 = [pytest.param(x, torch.bfloat16, 1, marks=pytest.mark.long) for x in FEW]


@pytest.mark.parametrize("architecture, dtype, margin", IN_FP32 + IN_BF16)
@pytest.mark.parametrize("place", ["pass", "steps"])
def test_verify_finds_a_wrong_mask_in_every_architecture(tiny, monkeypatch, architecture, place, dtype, margin):
    """In steps, and in the packed pass one of four mistakes for each type."""
    model = tiny(architecture).to(dtype)
    of_passes = [name for name in WRONG if "steps" not in name]
    wrong = "steps see later text" if place == "steps" else of_passes[list(ARCHITECTURES).index(architecture) % 4]
    monkeypatch.setattr(*WRONG[wrong])
    report = quietstar.verify(model)
    off = {part for part in ("text", "thoughts", "stepwise") if getattr(report, part) > margin * report.bound}
    assert off == {"stepwise"} if "steps" in wrong else off & {"text", "thoughts"}


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_a_model_type_that_cannot_think_is_refused_with_its_reason(name):
    config = AutoConfig.for_model(name)
    with pytest.raises(ValueError, match=f"model type '{name}' cannot think: {REFUSED[name][:20]}"):
        check_architecture(config)


def test_a_text_past_the_learned_positions_is_refused(tiny):
    qs = quietstar.QuietStar(tiny("gpt2", n_positions=24, max_position_embeddings=24), verify=False)
    ids = torch.randint(3, 61, (1, 16))
    with pytest.raises(ValueError, match="need 30 positions and GPT2LMHeadModel has 24 learned positions"):
        qs(ids)
    padded = torch.cat([ids[:, :10], torch.zeros(1, 6, dtype=torch.long)], 1)
    assert torch.isfinite(qs(padded, attention_mask=(padded != 0).long(), seed=0).loss)
