"""thought_decode in Triton: every tile, texts in parts, compiles."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from quietstar_kernels import ThoughtLayout, thought_decode  # noqa: E402
from quietstar_kernels.testing import assert_op_close_as_plain, decode_inputs, plain_decode, random_layout  # noqa: E402
from quietstar_kernels.triton import _launch, configs  # noqa: E402
from quietstar_kernels.triton import thought_decode as op  # noqa: E402
from quietstar_kernels.triton.configs import INTERPRETED  # noqa: E402
from tests.kernels.drawn import seeded

DEVICE = "cpu" if INTERPRETED else "cuda"
on_triton = partial(thought_decode, backend="triton")


def check(layout, inputs, what, **options):
    assert_op_close_as_plain(on_triton, plain_decode, inputs, (), what, layout=layout, **options)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU takes its own tiles")
@pytest.mark.parametrize(
    "size, width",
    [
        pytest.param(size, width, marks=[] if size == 2 else pytest.mark.kernels)
        for architecture, size, width in configs.THOUGHT_DECODE
        if architecture == "sm_90"
    ],
)
def test_shipped_tiles(monkeypatch, size, width):
    """Thoughts at every second position, split by the end of a tile; text of several blocks, two documents."""
    monkeypatch.setattr(configs, "target", lambda: "sm_90")
    lo = torch.zeros(1, 150, dtype=torch.int32)
    lo[:, 40:] = 40
    layout = ThoughtLayout.at(torch.arange(0, 150, 2)[None], 1, 3, lo=lo)
    dtype = torch.float16 if size == 2 else torch.float32
    inputs = decode_inputs(seeded(0), layout, 3, 1, width, sinks=True, dtype=dtype)
    check(layout, inputs, f"{size} {width}", step=2, window=100)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["any_lo", "ragged"])
def test_parts_of_the_text_add_up(monkeypatch, kind):
    """Also with more parts than blocks of keys, and with parts that some thoughts don't see. Two runs agree bitwise."""
    layout = random_layout(seeded(1), kind, 1, 90, 1, 4, device=DEVICE)
    inputs = decode_inputs(seeded(2), layout, 2, 1, sinks=True)
    monkeypatch.setattr(_launch, "_plans", {})  # plans remember the number of parts
    for splits, options in ((2, {}), (3, {"window": 30}), (7, {"softcap": 2.0})):
        monkeypatch.setattr(op, "splits_of", lambda *_, splits=splits: splits)
        options["step"] = layout.S - 1
        check(layout, inputs, f"{splits} parts {options}", **options)
    assert torch.equal(*(on_triton(**inputs, layout=layout, **options) for _ in range(2)))


@pytest.mark.parametrize("splits", [1, 3])
def test_an_infinity_in_a_block_without_a_mask(monkeypatch, splits):
    """It makes all of a row NaN, not only the column that it is in."""
    monkeypatch.setattr(_launch, "_plans", {})
    monkeypatch.setattr(op, "splits_of", lambda *_: splits)
    layout = ThoughtLayout.at(torch.tensor([[3, 60]], device=DEVICE), 1, 2, text_length=70)
    inputs = decode_inputs(seeded(0), layout, 1, 1, 16)
    inputs["v_text"][0, 0, 5, 3] = torch.inf
    out = on_triton(**inputs, layout=layout, step=1)
    assert out[0, 0, 0].isfinite().all() and out[0, 0, 1].isnan().all()
