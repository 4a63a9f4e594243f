"""``FlopCounterMode`` counts the useful matrix products of the ops, as it counts those of PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.fx_utils import count_flops_fx, countable_fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from quietstar_kernels import ThoughtLayout, linear_logprob, sample_token, thought_attention, thought_decode


def flops(function, *tensors, backward=True):
    """Of the forward and of the backward."""
    tensors = [x.clone().requires_grad_(backward and x.is_floating_point()) for x in tensors]
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    if not backward:
        return forward.get_total_flops()
    with FlopCounterMode(display=False) as back:
        out.sum().backward()
    return forward.get_total_flops(), back.get_total_flops()


def test_attention_over_text_counts_as_sdpa():
    layout = ThoughtLayout.every_position(2, 24, 1, 1).text_only()
    q, k, v = torch.randn(3, 2, 4, 24, 16)
    shapes = q.shape, k.shape, v.shape
    want = flop_counter.sdpa_flop_count(*shapes), flop_counter.sdpa_backward_flop_count(q.shape, *shapes)
    assert flops(lambda *qkv: thought_attention(*qkv, layout), q, k, v) == want


@pytest.mark.parametrize("packed", [False, True])
def test_thoughts_count_the_text_and_their_own_rows(packed):
    """K = 8, E = 4, 3 branches of 5 rows on a text of 7."""
    anchors = torch.tensor([[1, 3, 6]])
    packed_layout = ThoughtLayout.packed(anchors, torch.full((1, 3), 5), text_length=7)
    layout = packed_layout if packed else ThoughtLayout.at(anchors, 1, 5, text_length=7)
    q, v = torch.randn(1, 2, 22, 8), torch.randn(1, 2, 22, 4)
    pairs = 22 * 7 + 15 * 5
    assert flops(lambda q, v: thought_attention(q, q, v, layout), q, v) == (2 * 2 * pairs * 12, 2 * 2 * pairs * (3 * 8 + 2 * 4))
    only = flops(lambda q, v: thought_attention(q[:, :, 7:], q, v, layout, query_rows="thoughts"), q, v, backward=False)
    assert only == 2 * 2 * 15 * 12 * 12
    own_k, own_v = torch.randn(1, 2, 3, 5, 8), torch.randn(1, 2, 3, 5, 4)
    step = flops(
        lambda q, v: thought_decode(q[:, :, :3], q[:, :, :7], v[:, :, :7], own_k, own_v, layout, 2), q, v, backward=False
    )
    assert step == 2 * 2 * 3 * 12 * 12


@pytest.mark.parametrize("keep_bytes", [None, 0])
def test_heads_count_as_linear(keep_bytes):
    hidden, weight, targets = torch.randn(10, 8), torch.randn(20, 8), torch.arange(10)
    logprob = lambda h, w: linear_logprob(h, w, targets, keep_bytes=keep_bytes)  # noqa: E731
    assert flops(logprob, hidden, weight) == flops(F.linear, hidden, weight) == (3200, 6400)
    frozen = flops(lambda h: linear_logprob(h, weight, targets, keep_bytes=keep_bytes), hidden)
    assert frozen == (3200, 3200)
    counters = torch.zeros(10, 4, dtype=torch.int32)
    assert flops(lambda h, w: sample_token(h, w, counters, 0)[1], hidden, weight, backward=False) == 3200


def test_inductor_counts_them():
    hidden, weight, targets = torch.randn(10, 8), torch.randn(20, 8), torch.arange(10)
    graph = make_fx(lambda h, w: linear_logprob(h, w, targets), tracing_mode="fake", _allow_non_fake_inputs=True)(
        hidden, weight
    )
    counted = [count_flops_fx(node) for node in graph.graph.nodes if node.op == "call_function" and countable_fx(node)]
    assert counted == [3200]
