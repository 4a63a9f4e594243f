"""One small call of every Triton kernel in 16 bit, for a GPU: what ``--modules`` of the plugin takes apart."""

from functools import partial

import pytest
import torch

from quietstar_kernels import ThoughtLayout, linear_logprob, sample_token, self_test, thought_attention, thought_decode
from quietstar_kernels.testing import (
    assert_op_close_as_plain,
    attention_inputs,
    attention_magnitudes,
    decode_inputs,
    logprob_inputs,
    plain_attention,
    plain_decode,
    plain_logprob,
    sample_inputs,
)
from quietstar_kernels.triton.configs import INTERPRETED
from tests.kernels.drawn import seeded

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
OPTIONS = {"window": 9, "softcap": 2.0}
BRANCHES = ThoughtLayout.at(torch.tensor([[66, 70]]), 1, 3, text_length=72)
TREE = ThoughtLayout.tree(*torch.tensor([[[66, -1, -1, 70]], [[-1, 0, 0, -1]], [[70, 40, 60, 3]]]), text_length=72)


@pytest.mark.parametrize(
    "layout, options", [(BRANCHES, {}), (BRANCHES, OPTIONS), (TREE, OPTIONS)], ids=["plain", "options", "tree"]
)
def test_attention(layout, options):
    """Own rows, and text at both edges of blocks and in blocks without a mask; a tile that begins in a node with a parent."""
    inputs = attention_inputs(seeded(0), layout, 1, 1, 16, 16, sinks=bool(options), dtype=DTYPE)
    grad_out = torch.randn(inputs["q"].shape, generator=seeded(1)).to(DTYPE)
    op = partial(thought_attention, return_lse=True, backend="triton")
    magnitudes = attention_magnitudes(inputs, grad_out)
    assert_op_close_as_plain(op, plain_attention, inputs, (grad_out,), magnitudes=magnitudes, layout=layout, **options)


@pytest.mark.parametrize("text", [40, 600], ids=["whole", "in parts"])
def test_decode(text):
    layout = ThoughtLayout.at(torch.tensor([[3, text - 2]]), 1, 3, text_length=text)
    inputs = decode_inputs(seeded(0), layout, 1, 1, 16, dtype=DTYPE)
    op = partial(thought_decode, backend="triton")
    assert_op_close_as_plain(op, plain_decode, inputs, layout=layout, step=1)


def test_tree_decode():
    inputs = decode_inputs(seeded(0), TREE, 1, 1, 16, dtype=DTYPE)
    assert_op_close_as_plain(partial(thought_decode, backend="triton"), plain_decode, inputs, layout=TREE, step=1)


def test_sample_token():
    inputs = sample_inputs(seeded(0), 3, 16, 300, dtype=DTYPE)
    ids, reference = (sample_token(**inputs, seed=5, backend=backend)[0] for backend in ("triton", "reference"))
    assert torch.equal(ids, reference)


@pytest.mark.parametrize("keep_bytes", [0, 2**28], ids=["again", "kept"])
def test_linear_logprob(keep_bytes):
    inputs = logprob_inputs(seeded(0), 5, 16, 300, dtype=DTYPE)
    grads = tuple(torch.randn(2, 5, generator=seeded(1)))
    op = partial(linear_logprob, backend="triton", keep_bytes=keep_bytes, return_entropy=True)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads)


@pytest.mark.parametrize("op", ["rms_norm", "rotary", "rotary_decode", "gated_activation"])
def test_layer(op):
    device = torch.device("cpu" if INTERPRETED else "cuda")
    assert self_test.JUDGES[op]("triton", device, DTYPE) <= 1
