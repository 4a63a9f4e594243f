"""thought_attention in Triton: the tiles of GPUs, as other tests run small ones; one compile for all lengths."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from quietstar_kernels import ThoughtLayout
from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.testing import assert_op_close_as_plain, attention_inputs, plain_attention

pytest.importorskip("triton")

from quietstar_kernels.triton import configs  # noqa: E402
from quietstar_kernels.triton._target import INTERPRETED  # noqa: E402
from quietstar_kernels.triton.thought_attention import forward as op  # noqa: E402


def forward(q, k, v, layout, sinks):
    return op.thought_attention(q, k, v, layout, AttentionOptions(q.shape[-1] ** -0.5, None, None, sinks))


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


@pytest.mark.slow
def test_one_compile_serves_all_lengths():
    """Lengths of texts and thoughts, batches and head groups. The cases include 1, multiples of 16 and other numbers.

    The forward without options has two tables of tiles, one of them for short texts.
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
        assert launches["attention_forward"] == 4
        assert compiles == dict.fromkeys(launches, 1) | {"attention_forward": forwards}
