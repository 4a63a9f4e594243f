"""Leaks are those that a loop over thoughts finds."""

import pytest
import torch

from quietstar.objective import LEAK, following, leaks, make_targets
from quietstar_kernels import ThoughtLayout


def one(thought, tokens, length=None):
    lengths = None if length is None else torch.tensor([[[length]]])
    return bool(leaks(torch.tensor([[[thought]]]), lengths, torch.tensor([[tokens]])))


@pytest.mark.parametrize(
    "thought, tokens, length, leaked",
    [
        ([9, 1, 2, 3, 4], [1, 2, 3, 4], None, True),
        ([1, 2, 3, 4, 9], [1, 2, 3, 4, 5], 4, True),  # at the end of the thought; more of the text is known
        ([9, 1, 2, 3, 4], [1, 2, 3, 4], 4, False),  # the last of them was not sampled
        ([1, 2, 9, 3, 4], [1, 2, 3, 4], None, False),  # not one after another
        ([1, 2, 3, 5, 9], [1, 2, 3, 4], None, False),
        ([1, 2, 3, -100, 9], [1, 2, 3, -100], None, False),  # the text ends
        ([1, 2, 3, 4, 9], [1, 2, 3], None, False),
        ([1, 2, 3], [1, 2, 3, 4], None, False),
    ],
)
def test_what_a_leak_is(thought, tokens, length, leaked):
    assert one(thought, tokens, length) == leaked


@pytest.mark.parametrize("with_lengths", [False, True])
def test_as_a_loop_finds_them(with_lengths):
    generator = torch.Generator().manual_seed(0)
    B, P, N, T = 3, 5, 4, 40
    thoughts = torch.randint(2, (B, P, N, T), generator=generator)
    lengths = torch.randint(T + 1, (B, P, N), generator=generator) if with_lengths else None
    tokens = torch.randint(2, (B, P, LEAK), generator=generator)
    tokens[0, 0, 2:] = -100
    got = leaks(thoughts, lengths, tokens)
    for b, p, n in torch.cartesian_prod(*map(torch.arange, (B, P, N))).tolist():
        length = T if lengths is None else int(lengths[b, p, n])
        thought, wanted = thoughts[b, p, n, :length].tolist(), tokens[b, p].tolist()
        assert bool(got[b, p, n]) == any(thought[i : i + LEAK] == wanted for i in range(length))
    assert got.any() and not got.all()


def test_long_thoughts_are_compared_at_once():
    thoughts = torch.zeros(2, 64, 2, 4096, dtype=torch.int64)
    thoughts[1, 3, 1, -LEAK:] = 1
    got = leaks(thoughts, None, torch.ones(2, 64, LEAK, dtype=torch.int64))
    assert got.nonzero().tolist() == [[1, 3, 1]]


def test_what_follows_an_anchor():
    labels = torch.tensor([[10, 11, 12, 13, -100, 15, 16, 17]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    layout = ThoughtLayout.from_documents(documents, 1, 8, anchors=torch.tensor([[0, 2, 3, 6, -1]]))
    got = following(labels, layout).tolist()
    none = [-100] * 4
    assert got == [[[11, 12, -100, -100], none, [-100, 15, 16, 17], [17, -100, -100, -100], none]]


@pytest.mark.parametrize("anchors", [None, torch.tensor([[2, 3, 8], [0, 5, -1]])])
def test_what_follows_is_what_thoughts_predict(anchors):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
    labels = torch.arange(18).view(2, 9)
    layout = ThoughtLayout.from_padding(mask, 1, LEAK + 3, anchors=anchors)
    wanted = make_targets(labels, mask, layout, LEAK).mix[:, :, 0]
    assert torch.equal(following(labels.masked_fill(mask == 0, -100), layout), wanted)
