"""Thoughts of different lengths: each equals its own ordinary forward, and what comes after its end changes nothing."""

import dataclasses

import pytest
import torch

from quietstar import explain
from quietstar.evaluation.losses import token_losses
from quietstar.evaluation.scoring import one_thought, score_tokens
from quietstar.hf.decoder import decode_step
from quietstar.thinking import rollout
from tests.quietstar.common import step, text

T, J, L = 3, 2, 10


def some_lengths(B=2, P=L, seed=1):
    lengths = torch.randint(0, T + 1, (B, P, 2), generator=torch.Generator().manual_seed(seed))
    assert set(lengths.flatten().tolist()) == set(range(T + 1))
    return lengths


def test_what_stands_past_the_end_changes_nothing(thinker):
    """Not even ids outside the vocabulary."""
    qs = thinker()
    ids, lengths = text(2, L), some_lengths()
    thoughts = qs.think(ids, seed=0).thought_ids
    past = torch.arange(T) >= lengths[..., None]
    results = []
    for filler in (7, -1, 1000):
        out, grads = step(qs, ids, thought_ids=thoughts.masked_fill(past, filler), thought_lengths=lengths)
        assert not out.logprob[past].any() and out.logprob[~past & (out.advantage > 0)[..., None]].all()
        results.append([out.loss, *grads.values()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("greedy", [False, True])
def test_given_lengths_cut_what_would_be_thought(thinker, greedy):
    qs = thinker("mistral")
    ids, lengths = text(2, L), some_lengths()
    whole = qs.think(ids, seed=1, greedy=greedy)
    assert whole.thought_lengths is None
    cut = qs.think(ids, seed=1, greedy=greedy, thought_lengths=lengths)
    on = torch.arange(T) < lengths[..., None]
    assert torch.equal(cut.thought_ids, torch.where(on, whole.thought_ids, 0))
    torch.testing.assert_close(cut.logprob, torch.where(on, whole.logprob, 0))
    assert torch.equal(cut.thought_lengths, lengths)


END = 60


@torch.no_grad()
def slow_stops(qs, ids, thoughts, threshold):
    """[B,P,N], the first place before which the end is likelier than the threshold, else T; a forward for each thought."""
    embed = qs.model.get_input_embeddings()
    start = qs.thought_config.embedding_scale * qs.start_embedding
    lengths = torch.full(thoughts.shape[:3], T)
    for b, t, n in torch.cartesian_prod(*(torch.arange(size) for size in lengths.shape)).tolist():
        rows = torch.cat([embed(ids[b, : t + 1]), start[None], embed(thoughts[b, t, n, :-1])])
        p = qs.model(inputs_embeds=rows[None]).logits[0, t + 1 :].softmax(-1)[:, END]
        if (p > threshold).any():
            lengths[b, t, n] = int((p > threshold).nonzero()[0])
    return lengths


@pytest.mark.parametrize("chunk", [None, 4])
def test_thoughts_stop_where_the_end_is_likely(thinker, chunk):
    qs = thinker(end_token_id=END)
    threshold = 1 / 61
    ids = text(2, L)
    whole = qs.think(ids, seed=1, greedy=False).thought_ids
    want = slow_stops(qs, ids, whole, threshold)
    assert set(want.flatten().tolist()) == set(range(T + 1))
    qs.thought_config = dataclasses.replace(qs.thought_config, stop_threshold=threshold)
    qs.anchor_chunk = chunk
    thoughts = qs.think(ids, seed=1, greedy=False)
    assert torch.equal(thoughts.thought_lengths, want)
    assert torch.equal(thoughts.thought_ids, torch.where(torch.arange(T) < want[..., None], whole, 0))
    out = qs.train()(ids, seed=1)
    assert torch.equal(out.thought_lengths, want)
    again = qs(ids, thought_ids=thoughts.thought_ids, thought_lengths=want)
    assert torch.equal(out.loss, again.loss)
    shorter = qs.think(ids, seed=1, greedy=False, thought_lengths=torch.ones_like(want)).thought_lengths
    assert torch.equal(shorter, want.clamp(max=1))
    qs.eval()
    assert torch.equal(qs(ids).thought_lengths, qs.think(ids, greedy=True).thought_lengths)


def test_a_rollout_ends_with_the_last_thought(thinker, monkeypatch):
    """Where all have stopped it takes no further step, and thinks what it would have thought."""
    qs = thinker(end_token_id=END)
    ids = text(2, L)
    whole = qs.think(ids, seed=1, greedy=False).thought_ids
    steps = []
    monkeypatch.setattr(rollout, "decode_step", lambda *args: (steps.append(args[3]), decode_step(*args))[1])
    for threshold, rows in ((0.0, 1), (1 / 61, T)):
        qs.thought_config = dataclasses.replace(qs.thought_config, stop_threshold=threshold)
        steps.clear()
        thoughts = qs.think(ids, seed=1, greedy=False)
        assert steps == list(range(rows))
        want = slow_stops(qs, ids, whole, threshold)
        assert torch.equal(thoughts.thought_lengths, want) and (threshold or not want.any())
        assert torch.equal(thoughts.thought_ids, torch.where(torch.arange(T) < want[..., None], whole, 0))
    padded = torch.tensor([[1] * L, [1] * 4 + [0] * (L - 4)])
    lengths = qs.think(ids, padded, seed=1, greedy=False).thought_lengths
    assert torch.equal(lengths[0], want[0]) and not lengths[1, 4:].any()


def test_what_reads_a_checkpoint_lets_thoughts_stop(tiny, thinker, byte_tokenizer):
    """Evaluation, scores and reports predict what the differentiable pass does after the same greedy thoughts."""
    qs = thinker(tiny("llama", vocab_size=257), byte_tokenizer, end_token_id=END, stop_threshold=1 / 400).eval()
    words = "many a model stops and thinks, now and then"
    ids = byte_tokenizer(words, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = one_thought(qs)(ids)
    want, lengths = out.nll_mix[0, :-1, 0, 0], out.thought_lengths[0, :-1, 0].tolist()
    assert set(lengths) == set(range(T + 1))
    tokens = explain(qs, words).tokens[1:]
    assert [len(token.thoughts[0].ids) for token in tokens] == lengths
    _, scores = score_tokens(qs, [ids[0].tolist()], [range(1, ids.shape[1])])[0]
    losses = token_losses(qs, [{"input_ids": ids[0]}])
    for mixed in (torch.tensor([token.mixed for token in tokens]), -scores.logprob, losses.mixed.float()):
        torch.testing.assert_close(mixed, want, rtol=1e-4, atol=1e-4)


def test_generation_lets_thoughts_stop(thinker):
    """Two sampled thoughts in each of two texts, which end at different steps: the mean of the differentiable pass's."""
    qs = thinker("mistral", end_token_id=END, stop_threshold=1 / 61)
    ids, seen, spread = text(2, L), [], set()
    options = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0, "on_thoughts": seen.append}
    for place in range(2, L - J - 1):
        anchors = torch.tensor([[place], [place]])
        thoughts = qs.think(ids, anchors=anchors, seed=5, greedy=False)
        with torch.no_grad():
            out = qs(ids, anchors=anchors, thought_ids=thoughts.thought_ids, thought_lengths=thoughts.thought_lengths)
        logits = qs.generate(ids[:, : place + 1], max_new_tokens=1, thoughts=2, sample_thoughts=True, seed=5, **options).logits
        got = logits[0].gather(1, ids[:, place + 1 : place + 2])[:, 0]
        torch.testing.assert_close(got.exp(), (-out.nll_mix[:, 0, :, 0]).exp().mean(1), rtol=1e-4, atol=1e-6)
        on = torch.arange(T) < thoughts.thought_lengths[:, 0, :, None]
        assert torch.equal(seen[-1], torch.where(on, thoughts.thought_ids[:, 0], -1))
        spread |= {tuple(thoughts.thought_lengths.flatten().tolist())}
    assert any(len(set(lengths)) > 1 for lengths in spread)
