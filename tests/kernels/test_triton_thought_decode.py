"""thought_decode in Triton: every tile, texts in parts, compiles."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from quietstar_kernels import ThoughtLayout, thought_decode  # noqa: E402
from quietstar_kernels.testing import assert_op_close_as_plain, decode_inputs, plain_decode, random_layout  # noqa: E402
from quietstar_kernels.triton import _decode_splits, _launch, configs  # noqa: E402
from quietstar_kernels.triton import thought_decode as op  # noqa: E402
from quietstar_kernels.triton._target import INTERPRETED  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
on_triton = partial(thought_decode, backend="triton")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def check(layout, inputs, what, **options):
    assert_op_close_as_plain(on_triton, plain_decode, inputs, (), what, layout=layout, **options)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU takes its own tiles")
@pytest.mark.parametrize("size, width", [key[1:] for key in configs.THOUGHT_DECODE if key[0] == "sm_90"])
def test_shipped_tiles(monkeypatch, size, width):
    """Thoughts at every second position, split by the end of a tile; text of several blocks, two documents."""
    monkeypatch.setattr(configs, "target", lambda: "sm_90")
    lo = torch.zeros(1, 150, dtype=torch.int32)
    lo[:, 40:] = 40
    layout = ThoughtLayout.at(torch.arange(0, 150, 2)[None], 1, 3, lo=lo)
    dtype = torch.float16 if size == 2 else torch.float32
    inputs = decode_inputs(seeded(0), layout, 3, 1, width, sinks=True, dtype=dtype)
    check(layout, inputs, f"{size} {width}", step=2, window=100)


@pytest.mark.parametrize("kind", ["every", "anchors", "documents", "any_lo", "ragged"])
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


def test_number_of_parts(monkeypatch):
    """One wave of programs; a part has at least some blocks of keys."""
    monkeypatch.setattr(_decode_splits, "processors", lambda device: 132)
    splits = partial(_decode_splits.splits_of, block=64, device=torch.device(DEVICE))
    assert [splits(tiles, 4096) for tiles in (1, 8, 40, 66, 67, 132, 5000)] == [16, 16, 3, 2, 1, 1, 1]
    assert [splits(8, L) for L in (0, 255, 256, 1000, 1024)] == [1, 1, 1, 3, 4]


@pytest.mark.slow
def test_one_compile_serves_all_sizes():
    """Sizes of batch, text, anchors, thoughts, rows, heads, parts of the text and steps. Long texts have other tiles, and
    with a window, of any length, it is another kernel."""
    code = """
import json, torch
from ahead_of_time import compiled_for
from compiled.thought_decode import decode
sizes = [dict(L=1, C=1, S=1, heads=1, groups=1), dict(L=4096, C=1), dict(B=3, L=100, C=14, S=12)]
sizes += [dict(heads=heads, C=256 * heads) for heads in (1, 2, 3, 8, 16, 71)] + [dict(L=16, C=256, S=16, groups=16)]
with compiled_for("sm_90") as kernels:
    for size in sizes:
        decode(torch.bfloat16, 64, 64, (None, None, False), **size)
    for window in (1, 16, 77):
        decode(torch.bfloat16, 64, 64, (window, None, False))
print(json.dumps([[kernel.metadata.name, kernel.hash] for kernel in kernels]))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = json.loads(run.stdout)
    decodes = [hash for name, hash in kernels if name == "_decode"]
    short, (long,), window = [decodes[0], *decodes[2:-3]], decodes[1:2], decodes[-3:]
    assert len(decodes) == 13 and len(set(short)) == len(set(window)) == 1 and len({*short, long, *window}) == 3
    assert len({hash for name, hash in kernels if name == "_add_parts"}) == 1
