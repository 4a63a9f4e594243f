"""Rotary embeddings that change with the longest position: text rows equal the plain model's, or the layout is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Olmo3Config, Phi3Config

import quietstar
from quietstar_kernels import ThoughtLayout

CHANGE = 16  # the longest text whose rotary embeddings are the short ones
V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": CHANGE}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
PER_LAYER = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
LONG = {"max_position_embeddings": 128}
CONFIGS = {
    "phi3": Phi3Config(**SIZES, **LONG, original_max_position_embeddings=CHANGE, rope_parameters=LONGROPE),
    "llama": LlamaConfig(**SIZES, max_position_embeddings=CHANGE, rope_parameters=DYNAMIC),
    "gemma3_text": Gemma3TextConfig(
        **SIZES, **PER_LAYER, **LONG, rope_parameters={"full_attention": LONGROPE, "sliding_attention": PLAIN}
    ),
    "olmo3": Olmo3Config(
        **SIZES,
        **{**PER_LAYER, "max_position_embeddings": CHANGE},
        rope_parameters={"full_attention": DYNAMIC, "sliding_attention": PLAIN},
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    """``model(attention)``, always with the same weights."""

    def make(attention):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[request.param]), attn_implementation=attention).eval()

    return make


def draws(count):
    """(text length, rows of a thought) on both sides of the change and at it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield tuple(int(torch.randint(low, high, (), generator=generator)) for low, high in ((6, CHANGE + 4), (3, 9)))


@torch.no_grad()
def test_attention_without_the_wrapper(model):
    dropped_in, plain = model(quietstar.register_attention()), model("eager")
    seen = {True: 0, False: 0}
    for L, S in draws(12):
        ids = torch.randint(3, V, (1, L))
        layout = ThoughtLayout.every_position(1, L, 1, S)
        packed = torch.cat([ids, torch.randint(3, V, (1, layout.M - L))], 1)
        try:
            rows = dropped_in(packed, position_ids=layout.position_ids(), thought_layout=layout, use_cache=False).logits
        except ValueError as refused:
            assert "rotary embeddings change" in str(refused)
            assert L + S > CHANGE - 1
        else:
            torch.testing.assert_close(rows[:, :L], plain(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
            assert L + S <= CHANGE
        seen[L + S > CHANGE] += 1
    assert min(seen.values()) > 2


def test_the_wrapper(model):
    qs = quietstar.QuietStar(model("sdpa"), quietstar.ThoughtConfig(thoughts=1, thought_tokens=3, lookahead=1), verify=False)
    plain = model("eager")
    for L in (CHANGE - 6, CHANGE - 3, CHANGE + 2):
        ids = torch.randint(3, V, (1, L))
        if L + 5 > CHANGE:
            with pytest.raises(ValueError, match=f"need {L + 5} positions and .* rotary embeddings change"):
                qs(ids)
            with pytest.raises(ValueError, match="rotary embeddings change"):
                qs.generate(ids, max_new_tokens=1)
        else:
            nll = torch.nn.functional.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            torch.testing.assert_close(qs(ids).nll_base[0], nll, rtol=1e-4, atol=1e-4)


def test_documents_count_their_own_positions(model):
    """Short documents in a long row change nothing."""
    attention = quietstar.register_attention()
    document_ids = torch.arange(3).repeat_interleave(8)[None]
    layout = ThoughtLayout.from_documents(document_ids, 1, 4)
    ids = torch.randint(3, V, (1, layout.M))
    rows = model(attention)(ids, position_ids=layout.position_ids(), thought_layout=layout, use_cache=False).logits
    torch.testing.assert_close(rows[:, 8:16], model("eager")(ids[:, 8:16]).logits, rtol=1e-4, atol=1e-4)
