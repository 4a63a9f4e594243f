"""thought_decode in CUDA: every tile, texts in parts, tensors whose rows don't start at multiples of 16 bytes."""

import random
from functools import partial

import pytest
import torch

from quietstar_kernels import ThoughtLayout, thought_decode
from quietstar_kernels.cuda import thought_decode as op
from quietstar_kernels.testing import assert_op_close_as_plain, decode_inputs, plain_decode, random_layout
from tests.kernels.drawn import seeded
from tests.kernels.test_trees import random_tree

on_cuda = partial(thought_decode, backend="cuda")


@pytest.fixture(autouse=True)
def device(cuda):
    return cuda


def check(layout, inputs, what, **options):
    assert_op_close_as_plain(on_cuda, plain_decode, inputs, (), what, layout=layout, **options)


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("K, rows", [(64, 128), (64, 64), (64, 32), (128, 128), (128, 64), (128, 32), (256, 64), (256, 32)])
def test_shipped_tiles(monkeypatch, K, rows, dtype, device):
    """Thoughts at every second position, split by the end of a tile; text of several blocks, two documents."""
    monkeypatch.setattr(op, "rows_of_tile", lambda *_: rows)
    lo = torch.zeros(1, 150, dtype=torch.int32)
    lo[:, 40:] = 40
    layout = ThoughtLayout.at(torch.arange(0, 150, 2)[None], 1, 3, lo=lo).to(device)
    inputs = decode_inputs(seeded(0), layout, 3, 1, K, sinks=True, dtype=dtype)
    for splits, options in ((1, {"window": 100}), (2, {"softcap": 3.0})):
        monkeypatch.setattr(op, "splits_of", lambda *_, splits=splits: splits)
        check(layout, inputs, f"{K} {rows} {options}", step=2, **options)


@pytest.mark.parametrize("heads", [1, 5, 40])
def test_heads_of_a_group(heads, device):
    """The 16 rows of a warp are 16 thoughts, some of 4 thoughts, or a part of one."""
    layout = random_layout(seeded(1), "ragged", 2, 9, 3, 4, device)
    inputs = decode_inputs(seeded(2), layout, heads, 1, 64, dtype=torch.float16)
    for step in range(layout.S):
        check(layout, inputs, f"{heads} heads, step {step}", step=step)


@pytest.mark.parametrize("kind", ["any_lo", "ragged"])
def test_parts_of_the_text_add_up(monkeypatch, kind, device):
    """Also with more parts than blocks of keys, and with parts that some thoughts don't see. Two runs agree bitwise."""
    layout = random_layout(seeded(1), kind, 1, 150, 1, 4, device)
    inputs = decode_inputs(seeded(2), layout, 2, 1, 64, sinks=True, dtype=torch.bfloat16)
    for splits, options in ((2, {}), (3, {"window": 30}), (7, {"softcap": 2.0})):
        monkeypatch.setattr(op, "splits_of", lambda *_, splits=splits: splits)
        options["step"] = layout.S - 1
        check(layout, inputs, f"{splits} parts {options}", **options)
    assert torch.equal(*(on_cuda(**inputs, layout=layout, **options) for _ in range(2)))


@pytest.mark.parametrize("K, rows", [(64, 64), (64, 32), (128, 64), (256, 32)])
def test_trees(monkeypatch, K, rows, device):
    """Several blocks of keys of a node above; nodes in one tile that go on from each other; text in parts."""
    monkeypatch.setattr(op, "rows_of_tile", lambda *_: rows)
    for seed in range(K, K + 6):
        draw = random.Random(seed)
        layout = random_tree(draw, device, own="causal")
        inputs = decode_inputs(seeded(seed), layout, 3, 1, K, sinks=True, dtype=torch.bfloat16)
        monkeypatch.setattr(op, "splits_of", lambda *_, splits=seed % 2 + 1: splits)
        options = {"step": draw.randrange(layout.S), "window": draw.choice([None, 1, 30]), "softcap": draw.choice([None, 2.0])}
        check(layout, inputs, f"seed {seed} {layout} {options}", **options)


def test_rows_that_start_anywhere(device):
    """Views that start at the second element, with strides that are not multiples of 8."""
    layout = ThoughtLayout.every_position(1, 6, 2, 2, device)
    inputs = decode_inputs(seeded(0), layout, 2, 1, 64, dtype=torch.bfloat16)
    want = on_cuda(**inputs, layout=layout, step=1)
    shifted = {name: torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for name, x in inputs.items() if x is not None}
    assert all(x.data_ptr() % 16 and x.stride(-2) == 67 for x in shifted.values())
    assert torch.equal(on_cuda(**shifted, layout=layout, step=1), want)


def test_tiles_and_parts_fit_the_gpu():
    """Tiles have many rows if there is enough work, but no more than fit the shared memory of a block; parts of the text have
    at least 256 positions, and are for less than one wave of blocks."""
    large, small = 227 * 1024, 99 * 1024
    assert [op.rows_of_tile(8, 8, K, large) for K in op.WIDTHS] == [32, 32, 32]
    assert [op.rows_of_tile(512, 8, K, large) for K in op.WIDTHS] == [64, 64, 64]
    assert [op.rows_of_tile(4096, 64, K, large) for K in op.WIDTHS] == [128, 128, 64]
    assert [op.rows_of_tile(4096, 64, K, small) for K in op.WIDTHS] == [128, 64, 32]
    assert [op.splits_of(tiles, 4096) for tiles in (1, 8, 40, 66, 131, 132, 5000)] == [16, 16, 7, 4, 3, 1, 1]
    assert [op.splits_of(8, L) for L in (0, 255, 256, 257, 1024)] == [1, 1, 1, 2, 4]


def test_what_it_does_not_serve():
    assert op.serves(torch.float16, 128, 128) is None
    assert "not in float32" in op.serves(torch.float32, 128, 128)
    assert "K=128, E=64" in op.serves(torch.bfloat16, 128, 64)
    assert "K=96" in op.serves(torch.bfloat16, 96, 96)
