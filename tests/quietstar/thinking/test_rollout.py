"""Parallel sampling: the thoughts are those of a slow sampler, and depend on counters, not on the batch."""

import pytest
import torch

import quietstar
from quietstar.hf.modules import backbone
from quietstar_kernels import sample_token
from tests.quietstar.common import text

CONFIG = quietstar.ThoughtConfig(thoughts=2, thought_tokens=4, lookahead=2)


@pytest.fixture
def qs(tiny):
    return quietstar.QuietStar(tiny("mistral"), CONFIG)


@torch.no_grad()
def slow_thoughts(qs, ids, seed):
    """Each token from forwards over everything before it. Behind it stand rows that a causal model does not see."""
    embed, N, T = qs.model.get_input_embeddings(), qs.thought_config.thoughts, qs.thought_config.thought_tokens
    b, t, n = torch.cartesian_prod(*(torch.arange(size) for size in (*ids.shape, N))).T
    places = torch.arange(len(b))
    embeds = torch.nn.functional.pad(embed(ids)[b], (0, 0, 0, 1 + T))
    embeds[places, t + 1] = qs.thought_config.embedding_scale * qs.start_embedding
    drawn = []
    for s in range(T):
        hidden = backbone(qs.model)(inputs_embeds=embeds, use_cache=False).last_hidden_state[places, t + 1 + s]
        counters = torch.stack([b, t, n, torch.full_like(b, s)], 1).int()
        drawn.append(sample_token(hidden, qs.lm_head.linear.weight, counters, seed))
        embeds[places, t + 2 + s] = embed(drawn[-1][0])
    return (torch.stack(x, 1).view(*ids.shape, N, T) for x in zip(*drawn, strict=True))


def test_the_thoughts_are_those_of_a_slow_sampler(qs):
    ids = text(2, 10)
    truth, logprob = slow_thoughts(qs, ids, seed=5)
    thoughts = qs.think(ids, seed=5)
    assert torch.equal(thoughts.thought_ids, truth)
    torch.testing.assert_close(thoughts.logprob, logprob, atol=1e-4, rtol=0)
    assert not torch.equal(qs.think(ids, seed=6).thought_ids, truth)


def test_a_text_thinks_alike_wherever_it_is(qs):
    """Alone, in any order, beside padding, packed with other documents, and at chosen anchors."""
    ids, names = text(3, 11), torch.tensor([7, 3, 9])

    def think(ids, mask=None, names=names, **options):
        return qs.think(ids, mask, seed=1, sequence_ids=names, **options).thought_ids

    whole, order = think(ids), torch.tensor([2, 0, 1])
    assert torch.equal(torch.cat([think(ids[b : b + 1], names=names[b : b + 1]) for b in range(3)]), whole)
    assert torch.equal(think(ids[order], names=names[order]), whole[order])
    pad, ones = torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 11, dtype=torch.long)
    for before, after in ((pad, pad[:, :0]), (pad[:, :0], pad)):
        padded = think(torch.cat([before, ids, after], 1), torch.cat([before, ones, after], 1))
        assert torch.equal(padded[:, before.shape[1] :][:, :11], whole)
    packed = think(ids.view(1, 33), names=names.repeat_interleave(11)[None], document_ids=torch.arange(33)[None] // 11)
    assert torch.equal(packed.view(whole.shape), whole)
    anchors = torch.tensor([[1, 4, 10], [0, 7, -1], [5, -1, -1]])
    chosen = think(ids, anchors=anchors)
    for b, p in (anchors >= 0).nonzero().tolist():
        assert torch.equal(chosen[b, p], whole[b, anchors[b, p]])


def test_greedy_in_evaluation_and_when_asked(qs):
    ids = text(3, 11)
    asked = qs.think(ids, greedy=True).thought_ids
    assert torch.equal(asked[:, :, 0], asked[:, :, 1])
    qs.eval()
    assert torch.equal(qs.think(ids).thought_ids, asked)
    assert torch.equal(qs(ids).thought_ids, asked)
    sampled = qs.think(ids, seed=1, greedy=False).thought_ids
    assert not torch.equal(sampled[:, :, 0], sampled[:, :, 1])


def test_start_and_end_ids_are_never_sampled(tiny):
    config = quietstar.ThoughtConfig(thoughts=8, thought_tokens=4, lookahead=2, start_token_id=59, end_token_id=60)
    plain = quietstar.QuietStar(tiny("llama"), quietstar.ThoughtConfig(thoughts=8, thought_tokens=4, lookahead=2))
    banning = quietstar.QuietStar(tiny("llama"), config)
    ids = torch.randint(3, 59, (4, 20), generator=torch.Generator().manual_seed(0))
    assert (plain.think(ids, seed=1).thought_ids >= 59).any()
    assert not (banning.think(ids, seed=1).thought_ids >= 59).any()
