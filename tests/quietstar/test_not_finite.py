"""Models whose logits are not finite: thinking, generating, explaining and training name the place and the cause."""

from dataclasses import replace

import pytest
import torch

import quietstar
from tests.quietstar.common import short_run

CONFIG = quietstar.ThoughtConfig(thoughts=2, thought_tokens=3, lookahead=2, embedding_init=3)
BROKEN = "transformer.wte.weight"
TEXTS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 3, 40, 4, 5, 6]])  # the model knows nothing of token 40
MESSAGE = rf"^the model's logits are not finite at text 1, position 2: its weight {BROKEN} holds NaN or infinity$"


def model_without(tiny, token, value=torch.nan, **changes):
    """The embedding of the token is not finite, and the model's thoughts never hold it."""
    model = tiny("gpt2", attn_pdrop=0.0, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, 10
        model.lm_head.weight[token] = 0
        model.lm_head.weight[token, 0] = -10
        model.transformer.wte.weight[token] = value
    return model


@pytest.fixture
def qs(tiny):
    return quietstar.QuietStar(model_without(tiny, 40), CONFIG, verify=False)


@pytest.mark.parametrize("greedy, value", [(True, torch.nan), (False, torch.inf)])
def test_think(tiny, greedy, value):
    qs = quietstar.QuietStar(model_without(tiny, 40, value), CONFIG, verify=False)
    with pytest.raises(ValueError, match=MESSAGE):
        qs.think(TEXTS, greedy=greedy)
    assert (qs.think(TEXTS[:1], greedy=greedy).thought_ids >= 0).all()
    assert (qs.think(TEXTS, anchors=torch.tensor([[0, 4], [0, 1]]), greedy=greedy).thought_ids >= 0).all()
    with pytest.raises(ValueError, match=MESSAGE.replace("position 2", "position 3")):
        qs.think(TEXTS, anchors=torch.tensor([[0, 4], [1, 3]]), greedy=greedy)


def test_an_overflow(tiny):
    """Of finite weights, in activations."""
    qs = quietstar.QuietStar(tiny("llama").half(), CONFIG)
    with torch.no_grad():
        qs.model.model.layers[0].mlp.down_proj.weight.mul_(1e4)
        qs.model.model.layers[0].mlp.up_proj.weight.mul_(1e4)
    message = "^the model's logits are not finite at text 0, position 0: its weights are finite, so it overflows in float16$"
    with pytest.raises(ValueError, match=message):
        qs.think(TEXTS)


@pytest.mark.parametrize(
    "options", [{}, {"think": 0.0}, {"think": "never"}, {"sample_thoughts": True, "thoughts": 2, "do_sample": True}], ids=str
)
def test_generate(qs, options):
    ids, mask = torch.tensor([[3, 4, 5], [0, 40, 3]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(ValueError, match=MESSAGE):
        qs.eval().generate(ids, mask, max_new_tokens=2, **options)


def test_generate_after_a_thought_that_is_not_the_model_s(tiny):
    """In its last step every logit is NaN, but the states after it are numbers."""
    qs = quietstar.QuietStar(tiny("llama"), CONFIG).eval()
    calls = []
    sample = type(qs.lm_head).sample

    def third_is_broken(self, hidden, *rest):
        calls.append(hidden)
        return sample(self, hidden * torch.nan if len(calls) == 3 else hidden, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(qs.lm_head), "sample", third_is_broken)
        with pytest.raises(
            ValueError, match="^the model's logits are not finite at text 0, position 5: its weights are finite"
        ):
            qs.generate(TEXTS[:1], max_new_tokens=1)


def test_explain(tiny, byte_tokenizer):
    model = model_without(tiny, byte_tokenizer("c")["input_ids"][0], vocab_size=257)
    qs = quietstar.QuietStar(model, CONFIG, byte_tokenizer, verify=False)
    message = f"^the model's logits are not finite at text 0, position 2: its weight {BROKEN} holds NaN or infinity$"
    for seed in (None, 0):
        with pytest.raises(ValueError, match=message):
            quietstar.explain(qs, "abcde", seed=seed)


def test_a_forward_gives_no_loss(qs):
    """A thought that was sampled from such logits is not learned from, even if all that comes after it is finite."""
    assert qs.train()(TEXTS, seed=0).loss.isnan()
    assert qs(TEXTS[:1], seed=0).loss.isfinite()
    out = qs(TEXTS, anchors=torch.tensor([[0, 1], [0, 1]]), seed=0, labels=torch.where(TEXTS == 40, -100, TEXTS))
    assert (out.thought_ids >= 0).all()


def test_train(qs, tmp_path):
    data = [{"input_ids": text} for text in TEXTS]
    message = f"^train: the loss is nan at step 1: the model's weight model.{BROKEN} holds NaN or infinity$"
    with pytest.raises(FloatingPointError, match=message):
        short_run(qs, data, tmp_path, steps=1)


@pytest.mark.parametrize("verify", [True, False])
def test_wrapping(tiny, verify):
    """Its own logits are needed to find how they are made from states."""
    model = tiny("qwen3", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    message = "^the model's logits are not finite on its first tokens: its weight model.norm.weight holds NaN or infinity$"
    with pytest.raises(ValueError, match=message):
        quietstar.QuietStar(model, CONFIG, verify=verify)


def test_thoughts_that_may_stop(tiny):
    config = replace(CONFIG, end_token_id=60, stop_threshold=0.5)
    with pytest.raises(ValueError, match=MESSAGE):
        quietstar.QuietStar(model_without(tiny, 40), config, verify=False).think(TEXTS)
