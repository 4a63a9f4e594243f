"""The wrapper: what it returns, what it refuses."""

from dataclasses import astuple, replace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import quietstar
from tests.quietstar.common import text

T, J = 4, 3


@pytest.fixture
def qs(tiny):
    return quietstar.QuietStar(tiny("llama"), quietstar.ThoughtConfig(thought_tokens=T, lookahead=J))


def test_a_new_head_rewards_nothing(qs):
    """Its last layer is zero, so mixed and base predictions agree and the published weight of 1e6 multiplies nothing."""
    out = qs(text(4, 20), seed=0)
    assert out.reward.abs().max() <= 1e-5
    assert not out.weight.any()


def test_embeddings_begin_with_the_token_that_is_named(tiny):
    class Tokenizer(PreTrainedTokenizerBase):
        def __init__(self):
            pass

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [5, 7] if text == "---" else []}

    model = tiny("llama")
    table = model.get_input_embeddings().weight.detach()

    def start(init, tokenizer=None):
        qs = quietstar.QuietStar(model, quietstar.ThoughtConfig(embedding_init=init), tokenizer)
        return qs.thought_config.embedding_scale * qs.start_embedding.detach()

    torch.testing.assert_close(start(9), table[9])
    torch.testing.assert_close(start(None), table.mean(0))
    torch.testing.assert_close(start(None, Tokenizer()), table[[5, 7]].mean(0))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        start("---")
    with pytest.raises(ValueError, match="gives no tokens"):
        start("", Tokenizer())
    with pytest.raises(ValueError, match="from 0 to V-1=60, got 61"):
        start(61)


def test_bfloat16_model_trains_with_fp32_rewards(tiny):
    qs = quietstar.QuietStar(tiny("llama").bfloat16(), quietstar.ThoughtConfig(thought_tokens=T, lookahead=J))
    out = qs(text(), seed=0)
    out.loss.backward()
    assert out.reward.dtype == out.loss.dtype == qs.start_embedding.dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in qs.parameters())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_keeps_rewards_in_fp32(qs, monkeypatch, backend):
    monkeypatch.setenv("QUIETSTAR_BACKEND", backend)
    torch.nn.init.normal_(qs.mixing_head[4].weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    qs.thought_config.policy_weight = 1.0
    thoughts = qs.think(text(), seed=0).thought_ids
    plain = qs(text(), thought_ids=thoughts)
    with torch.autocast("cpu", torch.bfloat16):
        out = qs(text(), thought_ids=thoughts)
        qs.think(text(), seed=0)
    out.loss.backward()
    assert out.reward.dtype == out.loss.dtype == torch.float32
    assert 0 < (out.loss_ce - plain.loss_ce).abs() < 0.05
    assert all(torch.isfinite(parameter.grad).all() for parameter in qs.parameters())


def test_autocast_leaves_the_head_on_a_cpu_its_own_weight(qs):
    hidden = torch.randn(3, qs.lm_head.linear.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        rows, weight, _ = qs.lm_head.operands(hidden.bfloat16())
    assert weight is qs.lm_head.linear.weight and rows.dtype == torch.float32


BAD_CALLS = {
    "device": (dict(input_ids=text().to("meta")), "input_ids must be on cpu like the model's embeddings, got meta"),
    "float ids": (dict(input_ids=text().float()), "input_ids must have dtype int32, int64, got float32"),
    "id outside": (dict(input_ids=text() + 50), "input_ids must be from 0 to V-1=60"),
    "short text": (dict(input_ids=text()[:, :4]), r"at least J\+2=5 tokens to look 3 ahead, got L=4"),
    "mask with holes": (dict(attention_mask=torch.tensor([[1, 0] * 6] * 2)), "padding inside the text"),
    "label shape": (dict(labels=text()[:1]), r"labels must have shape \[B,L\]=\[2,12\], got \[1,12\]"),
    "thought shape": (dict(thought_ids=text()), r"thought_ids must have shape \[B,P,N,T\]=\[2,12,2,4\], got \[2,12\]"),
    "long thought": (dict(thought_lengths=5 * torch.ones(2, 12, 2).long()), "thought_lengths must be from 0 to T=4, got 5"),
    "anchor outside": (dict(anchors=torch.tensor([[3, 12]] * 2)), "anchors must be from -1 to L-1=11"),
    "anchors descend": (dict(anchors=torch.tensor([[3, 2]] * 2)), "anchors must ascend"),
    "split document": (dict(document_ids=torch.tensor([[0, 1, 0] + [2] * 9] * 2)), "one in two pieces"),
    "seed of 65 bits": (dict(seed=2**64), "seed must be an integer of 64 bits, got 18446744073709551616"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_input_gets_one_sentence(qs, name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message) as raised:
        qs(**{"input_ids": text(), **changes})
    assert "\n" not in str(raised.value)


def test_a_text_on_another_device_is_refused(qs):
    ids = text(2, 9)
    qs.to("meta")
    for call in (qs, qs.think, qs.generate):
        with pytest.raises(ValueError, match="input_ids must be on meta like the model's embeddings, got cpu"):
            call(ids)


def test_a_text_holding_the_start_or_end_id_is_refused(tiny):
    config = quietstar.ThoughtConfig(thought_tokens=T, lookahead=J, start_token_id=7, end_token_id=8)
    qs = quietstar.QuietStar(tiny("llama"), config)
    ids = torch.full((2, 12), 20)
    ids[1, 4] = 8
    with pytest.raises(ValueError, match="must not hold the end-of-thought id 8, row 1 does at position 4"):
        qs(ids)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    assert torch.isfinite(qs(ids, mask, seed=0).loss)
    with pytest.raises(ValueError, match="thought_ids must not hold"):
        qs(ids[:1], thought_ids=torch.full((1, 12, 2, T), 7))
    with pytest.raises(ValueError, match="start_token_id must be from 0 to V-1=60, got 61"):
        quietstar.QuietStar(tiny("llama"), quietstar.ThoughtConfig(start_token_id=61))


def test_a_batch_that_was_checked_once_stands_for_its_tensors(qs):
    """Anchors chosen, thoughts of given lengths, padding, labels: forward, thoughts and counts are the same bits."""
    qs.use_config(replace(qs.thought_config, anchors="random", anchor_share=0.4))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    batch = {"input_ids": text(), "attention_mask": mask, "labels": text().masked_fill(text() % 3 == 0, -100)}
    texts = qs.train().texts(**batch, sequence_ids=torch.tensor([4, 5]), seed=2)
    want = qs(**batch, sequence_ids=torch.tensor([4, 5]), seed=2)
    got = qs(texts, seed=2)
    assert 1 <= texts.layout.P < 12 and torch.equal(got.anchors, want.anchors)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.thought_ids, want.thought_ids)
    assert torch.equal(qs.think(texts, seed=2).thought_ids, got.thought_ids)
    moved = texts.to(torch.device("meta"))
    assert moved.device.type == moved.layout.device.type == moved.labels.device.type == moved.anchors.device.type == "meta"
    assert moved.layout.branches.table.is_meta and moved.tables.targets.mix.is_meta and moved.tables.rows.place.is_meta
    copies = []
    copied = texts.map(lambda x: copies.append(x.dtype) or x.clone())
    assert len(copies) == len(set(copies)) and qs.with_tables(copied) is copied
    assert torch.equal(qs(copied, seed=2).loss, want.loss) and copied.tables.places.data_ptr() % 16 == 0
    with torch.inference_mode():
        texts = qs.texts(**batch, sequence_ids=torch.tensor([4, 5]), seed=2)
    qs(texts, seed=2).loss.backward()
    given = {"anchors": want.anchors, "thought_ids": want.thought_ids, "thought_lengths": want.thought_ids[..., 0] % (T + 1)}
    given = {**given, "old_logprob": want.logprob + 0.1}
    again = qs.texts(**batch, **given)
    assert torch.equal(qs(again).loss, qs(**batch, **given).loss)
    named = {name: x for name, x in given.items() if name in ("anchors", "thought_lengths")}
    assert all(map(torch.equal, astuple(qs.count_targets(again)), astuple(qs.count_targets(**batch, **named))))
    with pytest.raises(ValueError, match=r"labels, anchors: give it to QuietStar.texts, which made the batch"):
        qs(texts, labels=text(), anchors=want.anchors)
    with pytest.raises(ValueError, match=r"texts must have N=3 thoughts of S=T\+J\+1=8 rows, got N=2, S=8"):
        qs.with_config(replace(qs.thought_config, thoughts=3))(texts)
    with pytest.raises(ValueError, match=f"thought_ids must have thoughts at P={texts.layout.P} anchors of a text, got 12"):
        qs(text(), thought_ids=torch.zeros(2, 12, 2, T, dtype=torch.int64), seed=2)
