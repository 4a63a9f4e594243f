"""thought_attention in Triton: the tiles of GPUs, as other tests run small ones; one compile for all lengths."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from quietstar_kernels import ThoughtLayout, thought_attention
from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.testing import assert_op_close_as_plain, attention_inputs, attention_magnitudes, plain_attention

pytest.importorskip("triton")

from quietstar_kernels.triton import configs  # noqa: E402
from quietstar_kernels.triton._target import INTERPRETED  # noqa: E402
from quietstar_kernels.triton.thought_attention import backward_keys  # noqa: E402
from quietstar_kernels.triton.thought_attention import forward as op  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def forward(q, k, v, layout, sinks):
    return op.thought_attention(q, k, v, layout.branches, AttentionOptions(q.shape[-1] ** -0.5, None, None, sinks))


@pytest.mark.skipif(not INTERPRETED, reason="for GPUs the other tests run these tiles")
@pytest.mark.parametrize("entry, apart", [(("sm_90", 2, 128), 11), (("sm_90", 4, 256), 90)], ids=str)
def test_shipped_tiles(entry, apart, monkeypatch):
    """Whole and masked blocks of text, tiles of several thoughts, thoughts of more rows than a block of own keys."""
    monkeypatch.setattr(op, "pick", lambda *_: configs.ATTENTION_FORWARD[entry])
    generator = torch.Generator().manual_seed(0)
    layout = ThoughtLayout.at(torch.arange(3, 300, apart)[None], 2, 19, text_length=300)
    dtype = {2: torch.float16, 4: torch.float32}[entry[1]]
    inputs = attention_inputs(generator, layout, 3, 1, entry[2], 40, sinks=True, dtype=dtype)
    assert_op_close_as_plain(forward, plain_attention, inputs, what=str(entry), layout=layout)


@pytest.mark.parametrize("own, window", [("causal", None), ("full", 25)])
def test_long_branches(own, window, monkeypatch):
    """Own rows in blocks without a mask and in those at both edges, and keys of branches in the tiles of text."""
    monkeypatch.setattr(backward_keys, "PROGRAMS", 1)
    monkeypatch.setattr(backward_keys, "LONG", 1)
    lo = torch.tensor([[0] * 14 + [14] * 6], device=DEVICE)
    anchors, lengths = torch.tensor([[13, 13, 13, 19]], device=DEVICE), torch.tensor([[50, 0, 7, 39]], device=DEVICE)
    layout = ThoughtLayout.packed(anchors, lengths, lo=lo, rows=101, own=own)
    generator = torch.Generator().manual_seed(0)
    inputs = attention_inputs(generator, layout, 2, 1, 16, 16, sinks=True)
    grad_out = torch.randn(inputs["q"].shape, generator=generator).to(DEVICE)
    on_triton = partial(thought_attention, return_lse=True, backend="triton")
    options = {"magnitudes": attention_magnitudes(inputs, grad_out), "layout": layout, "window": window}
    assert_op_close_as_plain(on_triton, plain_attention, inputs, (grad_out,), own, **options)


@pytest.mark.parametrize("row", [5, 45], ids=["text", "branch"])
def test_an_infinity_in_a_block_without_a_mask(row):
    """It makes all of a row NaN, not only the column that it is in."""
    layout = ThoughtLayout.packed(torch.tensor([[39]], device=DEVICE), torch.tensor([[70]], device=DEVICE), 40)
    inputs = attention_inputs(torch.Generator().manual_seed(0), layout, 1, 1, 16, 16)
    inputs["v"][0, 0, row, 3] = torch.inf
    out, lse = thought_attention(**inputs, layout=layout, return_lse=True, backend="triton")
    sees = layout.dense_mask()[0, :, row]
    assert torch.equal(lse[0, 0].isnan(), sees) and torch.equal(out[0, 0].isnan(), sees[:, None].expand(-1, 16))
    assert out[0, 0, ~sees].isfinite().all()


@pytest.mark.slow
def test_one_compile_serves_all_lengths():
    """Lengths of texts and branches, batches and head groups. The cases include 1, multiples of 16 and other numbers.

    The forward without options has two tables of tiles, one of them for short texts; the keys of branches have two, one of them
    for long branches.
    """
    here = Path(__file__).parent
    code = """
import json, torch
from ahead_of_time import compiled_for
from compiled.thought_attention import OPTIONS, SIZES, backward, forward
for options in OPTIONS.values():
    with compiled_for("sm_90") as kernels:
        for sizes in SIZES:
            forward(torch.bfloat16, (64, 64), options, *sizes)
            backward(torch.bfloat16, (64, 64), options, *sizes)
    print(json.dumps([(kernel.metadata.name, kernel.hash) for kernel in kernels]))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(here)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    plain, with_options = (json.loads(line) for line in run.stdout.splitlines())
    for kernels, forwards in ((plain, 2), (with_options, 1)):
        launches = Counter(name for name, _ in kernels)
        compiles = Counter(name for name, _ in {tuple(kernel) for kernel in kernels})
        assert launches["attention_forward"] == 5
        assert compiles == dict.fromkeys(launches, 1) | {"attention_forward": forwards, "attention_backward_own_keys": 2}
