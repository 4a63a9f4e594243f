"""Branches: long ones, packed layouts that are grids, own="full", bad input. Random ones are drawn in test_trees.py."""

from functools import partial

import pytest
import torch

from quietstar_kernels import ThoughtLayout, sample_thoughts, thought_attention, thought_decode
from quietstar_kernels.testing import (
    assert_op_close_as_plain,
    attention_inputs,
    attention_magnitudes,
    forward_backward,
    plain_attention,
)
from tests.kernels.drawn import normal, seeded


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"window": 7, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("own", ["causal", "full"])
def test_long_branches(backend, own, options, device, interpreted):
    """Hundreds of rows: several tiles and blocks of own keys in a branch, next to small ones."""
    lengths = torch.tensor([[0, 1, 90, 40, 0, 3]] if interpreted else [[0, 1, 700, 300, 0, 3]])
    layout = ThoughtLayout.packed(torch.tensor([[0, 2, 2, 29, 29, 29]]), lengths, 30, own=own).to(device)
    inputs = attention_inputs(seeded(0), layout, 4, 1, 16, sinks=True)
    grad_out = normal(seeded(1), 1, 4, layout.M, 16, device=device)
    op = partial(thought_attention, return_lse=True, backend=backend)
    magnitudes = attention_magnitudes(inputs, grad_out)
    assert_op_close_as_plain(op, plain_attention, inputs, (grad_out,), magnitudes=magnitudes, layout=layout, **options)


def as_packed(layout):
    """The branches of a grid whose thoughts all have S rows."""
    B, P, N = layout.length.shape
    anchors = layout.anchor[:, :, None].expand(B, P, N).flatten(1)
    return ThoughtLayout.packed(anchors, layout.length.flatten(1), lo=layout.lo, own=layout.own)


GRIDS = {
    "every position": ThoughtLayout.every_position(2, 9, 2, 4),
    "full": ThoughtLayout.at(torch.tensor([[1, 5, 8], [0, 1, 2]]), 3, 5, text_length=9, own="full"),
    "documents": ThoughtLayout.from_documents(torch.tensor([[0, 0, 0, 1, 1]]), 1, 33),
}


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_packed_of_a_grid_is_the_grid(backend, name, options, device):
    grid = GRIDS[name].to(device)
    packed = as_packed(grid)
    assert (packed.R, packed.M, packed.P, packed.N) == (grid.R, grid.M, grid.P * grid.N, 1)
    for got, want in ((packed, grid), (packed.to("cpu"), grid.to("cpu"))):
        assert torch.equal(got.dense_mask(), want.dense_mask())
        assert torch.equal(got.position_ids(), want.position_ids())
        assert torch.equal(got.branch_of_row(), want.branch_of_row())
        assert torch.equal(got.row_in_branch(), want.row_in_branch())
    inputs = attention_inputs(seeded(0), grid, sinks=True)
    grad_out = normal(seeded(1), *inputs["q"].shape, device=device)
    op = partial(thought_attention, return_lse=True, backend=backend)
    of_grid, of_packed = (forward_backward(op, inputs, (grad_out,), layout=layout, **options) for layout in (grid, packed))
    assert all(map(torch.equal, of_grid[0], of_packed[0]))
    assert all(torch.equal(of_grid[1][name], of_packed[1][name]) for name in inputs)


def test_full_rows_see_later_rows_and_positions_stay():
    causal, full = (ThoughtLayout.at(torch.tensor([[1]]), 1, 3, text_length=3, own=own) for own in ("causal", "full"))
    assert causal.dense_mask()[0, 3:, 3:].tolist() == torch.ones(3, 3).tril().bool().tolist()
    assert full.dense_mask()[0, 3:, 3:].all()
    assert torch.equal(causal.dense_mask()[:, :, :3], full.dense_mask()[:, :, :3])
    assert torch.equal(causal.position_ids(), full.position_ids())
    window = full.dense_mask(window=2)[0, 3:]  # rows at position ids 2, 3 and 4; text at 0, 1 and 2
    assert window[:, 3:].tolist() == [[True, True, True], [True, True, True], [False, True, True]]
    assert window[:, :3].tolist() == [[False, True, False], [False] * 3, [False] * 3]


def test_full_stays_when_a_layout_changes():
    layout = ThoughtLayout.every_position(1, 4, 2, 3, own="full")
    assert {x.own for x in (layout.select(slice(1, 2)), layout.text_only(), layout.to("cpu"))} == {"full"}
    packed = ThoughtLayout.packed(torch.tensor([[1, 1]]), torch.tensor([[2, 1]]), 2, rows=5, own="full")
    assert packed.to("cpu").R == 5 and "packed own=full" in repr(packed)
    text, rows = packed.split(torch.arange(7)[None])
    assert text.tolist() == [[0, 1]] and rows.tolist() == [[2, 3, 4, 5, 6]]
    assert packed.live().tolist() == [[True, True, True, False, False]]
    assert packed.row_anchor().tolist() == [[1, 1, 1, 0, 0]]
    assert packed.position_ids().tolist() == [[0, 1, 2, 3, 2, 0, 0]]


def packed(anchors=((0, 1),), lengths=((1, 2),), text_length=2, **options):
    return ThoughtLayout.packed(torch.tensor(anchors), torch.tensor(lengths), text_length, **options)


def step(layout):
    q, text, own = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 3, 4)
    return thought_decode(q, text, text, own, own, layout, 0)


def sample(layout):
    return sample_thoughts(lambda ids, layout: None, torch.zeros(5, 4), layout, torch.zeros(1, 2).long(), 1, 0, 0)


BAD = {
    "ThoughtLayout: lengths must be 0 where anchors hold -1, broken at [0, 1] of shape [1, 2]": lambda: packed(((0, -1),)),
    "ThoughtLayout: the sum of lengths must be at most rows R=2, broken at [0] of shape [1, 2]": lambda: packed(rows=2),
    "ThoughtLayout: lengths must not be negative, broken at [0, 0] of shape [1, 2]": lambda: packed(lengths=((-1, 2),)),
    "ThoughtLayout: lengths must have shape [B,C]=[1,2], got [1,3]": lambda: packed(lengths=((1, 2, 3),)),
    "ThoughtLayout: anchors must be from -1 to L-1=1, broken at [0, 1] of shape [1, 2]": lambda: packed(((0, 2),)),
    "ThoughtLayout: packed() needs lo or text_length": lambda: packed(text_length=None),
    "ThoughtLayout: own must be one of causal, full, got 'both'": lambda: packed(own="both"),
    "ThoughtLayout: rows must be an integer of at least 0, got -1": lambda: packed(rows=-1),
    "ThoughtLayout.select: the layout must be a grid of P*N thoughts, got a packed one": lambda: packed().select(slice(1)),
    "sample_thoughts: layout must have own='causal', got own='full': a step can't see rows that are not there yet": lambda: (
        sample(packed(own="full"))
    ),
    "sample_thoughts: the layout must be a grid of P*N thoughts, got a packed one": lambda: sample(packed()),
    "thought_decode: layout must have own='causal', got own='full': a step can't see rows that are not there yet": lambda: step(
        packed(own="full")
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError) as raised:
        BAD[message]()
    assert str(raised.value) == message
