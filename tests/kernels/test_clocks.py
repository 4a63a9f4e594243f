"""The model of clocks counts the turns that the loops of the kernels take."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

import clocks  # noqa: E402

from quietstar_kernels import ThoughtLayout, thought_attention, thought_decode  # noqa: E402
from quietstar_kernels.testing import attention_inputs, decode_inputs  # noqa: E402
from quietstar_kernels.triton import thought_decode as decoding  # noqa: E402
from quietstar_kernels.triton.configs import (  # noqa: E402
    ATTENTION_BACKWARD_OWN_KEYS,
    ATTENTION_BACKWARD_QUERIES,
    ATTENTION_BACKWARD_TEXT_KEYS,
    ATTENTION_FORWARD,
    INTERPRETED,
    THOUGHT_DECODE,
)
from quietstar_kernels.triton.thought_attention import backward, backward_keys, forward  # noqa: E402
from tests.kernels.drawn import seeded  # noqa: E402

L, GROUP = 18, 2
COUNTED = [  # what each turn calls once
    (forward, "softmax_step"),
    (backward, "score_gradient"),
    (backward_keys, "weights"),
    (decoding, "softmax_step"),
]


def counting(taken, module, called):
    def counted(*args, **options):
        taken[module] += 1
        return called(*args, **options)

    return counted


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="counts calls of Python functions")
def test_turns_are_those_of_the_kernels(monkeypatch):
    taken = Counter()
    for module, name in COUNTED:
        monkeypatch.setattr(module, name, counting(taken, module, getattr(module, name)))
    layout = ThoughtLayout.every_position(1, L, clocks.N, clocks.S)
    inputs = attention_inputs(seeded(0), layout, GROUP, 1, 16, 16)
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    thought_attention(*leaves, layout=layout, backend="triton").sum().backward()
    step = torch.tensor(clocks.STEP)
    thought_decode(**decode_inputs(seeded(0), layout, GROUP, 1, 16), layout=layout, step=step, backend="triton")

    def turns(count, table):
        return sum(int(x.sum()) for x in count(L, GROUP, clocks.configs.pick(table, 4, 16).blocks))

    assert taken[forward] == turns(clocks.turns_of_queries, ATTENTION_FORWARD)
    assert taken[backward] == turns(clocks.turns_of_queries, ATTENTION_BACKWARD_QUERIES)
    keys = turns(clocks.turns_of_text_keys, ATTENTION_BACKWARD_TEXT_KEYS)
    assert taken[backward_keys] == keys + turns(clocks.turns_of_own_keys, ATTENTION_BACKWARD_OWN_KEYS)
    assert taken[decoding] == turns(clocks.turns_of_decode, THOUGHT_DECODE)
