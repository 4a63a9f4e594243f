"""sample_thoughts compared with a slow sampler, which runs every thought by itself after the text up to its anchor."""

import re

import pytest
import torch
from torch import nn

from quietstar_kernels import ThoughtLayout, sample_thoughts, sample_token, thought_attention

V, D, H, START, END, T = 40, 16, 2, 38, 39, 3


class Model(nn.Module):
    """One layer of attention, in fp64, so that packed and plain passes draw the same tokens."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(32, D)
        self.qkv, self.head = nn.Linear(D, 3 * D), nn.Linear(D, V, bias=False)
        self.to(torch.float64)

    def forward(self, ids, layout):
        x = self.tokens(ids) + self.positions(layout.position_ids())
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + thought_attention(3 * q, k, v, layout, backend="reference").transpose(1, 2).flatten(2)


@pytest.fixture
def model():
    return Model()


def text(B, L):
    return torch.randint(0, 38, (B, L), generator=torch.Generator().manual_seed(1))


def drawn(model, layout, input_ids, **options):
    options = {"thought_tokens": T, "start_id": START, "seed": 5, "banned": [START, END]} | options
    return sample_thoughts(model, model.head.weight, layout, input_ids, **options)


@torch.no_grad()
def slowly_drawn(model, layout, input_ids, sequence_ids):
    ids = torch.zeros(layout.B, layout.P, layout.N, T, dtype=torch.int64)
    logprob = torch.zeros(ids.shape)
    for b, p, n in torch.cartesian_prod(*map(torch.arange, ids.shape[:3])).tolist():
        anchor = int(layout.anchor[b, p])
        first = int(layout.lo[b, anchor])
        prefix = [*input_ids[b, first : anchor + 1].tolist(), START]
        for s in range(T):
            if anchor < 0 or s >= layout.length[b, p, n]:
                break
            plain = ThoughtLayout.every_position(1, len(prefix), 1, 1).text_only()
            hidden = model(torch.tensor([prefix]), plain)[0, -1:]
            counters = torch.tensor([[sequence_ids[b, anchor], anchor - first, n, s]], dtype=torch.int32)
            token, logp = sample_token(hidden, model.head.weight, counters, 5, banned=[START, END])
            ids[b, p, n, s], logprob[b, p, n, s] = token, logp
            prefix.append(int(token))
    return ids, logprob


PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 2, 2, -1, -1]])
ANCHORS = torch.tensor([[0, 2, 5], [1, 4, -1]])
LAYOUTS = {
    "every position": ThoughtLayout.every_position(2, 6, 2, T + 2),
    "one thought, no row to spare": ThoughtLayout.every_position(2, 6, 1, T),
    "anchors": ThoughtLayout.at(ANCHORS, 2, T + 3, text_length=6),
    "lengths": ThoughtLayout.at(ANCHORS, 2, T + 2, text_length=6, length=torch.arange(12).view(2, 3, 2) % (T + 3)),
    "padding": ThoughtLayout.from_padding(PADDING, 2, T + 2),
    "documents": ThoughtLayout.from_documents(DOCUMENTS, 2, T + 2),
    "no anchor": ThoughtLayout.at(torch.zeros(2, 0, dtype=torch.int64), 2, T + 2, text_length=6),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_thoughts_are_those_of_a_slow_sampler(model, name):
    layout, input_ids = LAYOUTS[name], text(2, 6)
    sequence_ids = DOCUMENTS.clamp(min=0) + 7 if name == "documents" else torch.arange(2)[:, None].expand(2, 6)
    ids, logprob = drawn(model, layout, input_ids, sequence_ids=sequence_ids if name == "documents" else None)
    truth, truth_logprob = slowly_drawn(model, layout, input_ids, sequence_ids)
    assert ids.dtype == torch.int64 and logprob.dtype == torch.float32 and not logprob.requires_grad
    assert torch.equal(ids, truth)
    torch.testing.assert_close(logprob, truth_logprob)


def test_a_thought_depends_on_neither_batch_nor_anchors(model):
    layout, input_ids = LAYOUTS["anchors"], text(2, 6)
    ids, _ = drawn(model, layout, input_ids)
    some, _ = drawn(model, layout.select(slice(1, 3)), input_ids)
    assert torch.equal(some, ids[:, 1:])
    alone = ThoughtLayout.at(ANCHORS[1:], 2, T + 3, text_length=6)
    assert torch.equal(drawn(model, alone, input_ids[1:], sequence_ids=torch.tensor([1]))[0], ids[1:])
    assert not torch.equal(drawn(model, layout, input_ids, seed=6)[0], ids)


def test_no_text_and_no_batch(model):
    off = ThoughtLayout.at(torch.full((2, 3), -1), 2, T, text_length=0)
    for sequence_ids in (None, torch.zeros(2, 0, dtype=torch.int64)):
        ids, logprob = drawn(model, off, torch.zeros(2, 0, dtype=torch.int64), sequence_ids=sequence_ids)
        assert ids.shape == (2, 3, 2, T) and not ids.any() and not logprob.any()
    assert drawn(model, ThoughtLayout.every_position(0, 6, 2, T), text(0, 6))[0].shape == (0, 6, 2, T)


def test_logits_that_are_not_finite_give_minus_one(model):
    with torch.no_grad():
        model.tokens.weight[7] = float("nan")
    input_ids = torch.tensor([[1, 2, 7, 3]])
    ids, logprob = drawn(model, ThoughtLayout.every_position(1, 4, 2, T), input_ids)
    assert (ids[:, :2] >= 0).all() and (ids[:, 2:] == -1).all() and logprob[:, 2:].isnan().all()


def wrong_rows(ids, layout):
    return torch.zeros(*ids.shape[:1], ids.shape[1] - 1, D)


BAD = [
    ({"thought_tokens": T + 4}, "thought_tokens must be from 1 to the layout's rows S=6, got 7"),
    ({"thought_tokens": 0}, "thought_tokens must be from 1 to the layout's rows S=6, got 0"),
    ({"start_id": -1}, "start_id must be an integer of at least 0, got -1"),
    ({"input_ids": text(2, 5)}, "input_ids must have shape [B,L]=[2,6], got [2,5]"),
    ({"input_ids": text(2, 6).float()}, "input_ids must have dtype int32, int64, got float32"),
    ({"sequence_ids": torch.arange(3)}, "sequence_ids must have shape [B]=[2], got [3]"),
    ({"sequence_ids": torch.zeros(2, 5).long()}, "sequence_ids must have shape [B,L]=[2,6], got [2,5]"),
    ({"forward": wrong_rows}, "what forward returns must have shape [B,M,D]=[2,12,?], got [2,11,16]"),
    ({"forward": lambda ids, layout: None}, "what forward returns must be a tensor [B,M,D], got None"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_refused(model, change, message):
    fine = {"forward": model, "weight": model.head.weight, "layout": LAYOUTS["anchors"], "input_ids": text(2, 6)}
    fine |= {"thought_tokens": T, "start_id": START, "seed": 5}
    sample_thoughts(**fine)
    with pytest.raises(ValueError, match="^sample_thoughts: " + re.escape(message)):
        sample_thoughts(**(fine | change))
