"""Leaks are those that a loop over thoughts finds."""

import pytest
import torch

from quietstar.objective import LEAK, following, leaks, make_targets, sampled
from quietstar_kernels import ThoughtLayout


@pytest.mark.parametrize("T, with_lengths", [(40, False), (40, True), (LEAK - 1, False)])
def test_as_a_loop_finds_them(T, with_lengths):
    generator = torch.Generator().manual_seed(0)
    B, P, N = 3, 5, 4
    thoughts = torch.randint(2, (B, P, N, T), generator=generator)
    lengths = torch.randint(T + 1, (B, P, N), generator=generator) if with_lengths else torch.full((B, P, N), T)
    tokens = torch.randint(2, (B, P, LEAK), generator=generator)
    tokens[0, 0, 2:] = -100
    got = leaks(thoughts, sampled(lengths, T), tokens)
    for b, p, n in torch.cartesian_prod(*map(torch.arange, (B, P, N))).tolist():
        length = int(lengths[b, p, n])
        thought, wanted = thoughts[b, p, n, :length].tolist(), tokens[b, p].tolist()
        assert bool(got[b, p, n]) == any(thought[i : i + LEAK] == wanted for i in range(length))
    assert got.any() == (T >= LEAK) and not got.all()


@pytest.mark.parametrize("anchors", [None, torch.tensor([[2, 3, 8], [0, 5, -1]])])
@pytest.mark.parametrize("documents", [False, True])
def test_what_follows_is_what_thoughts_predict(documents, anchors):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
    labels = torch.arange(18).view(2, 9).masked_fill((torch.arange(9) == 6) | (mask == 0), -100)
    make, of = ThoughtLayout.from_padding, mask
    if documents:
        make, of = ThoughtLayout.from_documents, torch.where(mask > 0, torch.arange(9) // 5, -1)
    layout = make(of, 1, LEAK + 3, anchors=anchors)
    assert torch.equal(following(labels, layout), make_targets(labels, layout, LEAK).mix[:, :, 0])
