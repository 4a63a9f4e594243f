"""FlopCounterMode counts the operators as it counts PyTorch's own products."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode

from quietstar_kernels import ThoughtLayout, linear_logprob, sample_token, thought_attention, thought_decode


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_head_counts_as_a_linear_layer(wanted):
    hidden, weight = (torch.randn(shape, requires_grad=want) for shape, want in zip([(5, 8), (20, 8)], wanted, strict=True))
    targets = torch.arange(5)
    plain = flops(lambda: cross_entropy(linear(hidden, weight), targets).backward())
    assert (
        flops(lambda: linear_logprob(hidden, weight, targets).sum().backward()) == plain == (1 + sum(wanted)) * 2 * 5 * 8 * 20
    )
    with torch.no_grad():
        assert flops(lambda: sample_token(hidden, weight, torch.zeros(5, 4, dtype=torch.int32), 0)) == 2 * 5 * 8 * 20


@pytest.mark.parametrize(
    "options, own",
    [({}, "causal"), ({}, "full"), ({"window": 3}, "causal")],
)
def test_attention_counts_what_rows_see(options, own):
    """A position at the middle of the text sees as much as a mean one does."""
    B, H, G, L, K, E = 2, 4, 2, 9, 8, 16
    layout = ThoughtLayout.at(torch.full((B, 1), L // 2), thoughts=2, rows=3, text_length=L, own=own)
    q, k, v = (torch.randn(B, heads, layout.M, width) for heads, width in ((H, K), (G, K), (G, E)))
    for x in (q, k, v):
        x.requires_grad_()
    seen = int(layout.dense_mask(**options).sum())
    forward, both = 2 * (K + E) * H * seen, 2 * (4 * K + 3 * E) * H * seen
    assert flops(lambda: thought_attention(q, k, v, layout, **options)) == forward
    assert flops(lambda: thought_attention(q, k, v, layout, **options).sum().backward()) == both


def test_a_decoding_step_counts_the_text_and_half_of_its_own_rows():
    layout = ThoughtLayout.every_position(1, 9, 2, 3)
    k_text, v_text, k_own, v_own = (torch.randn(1, 2, *shape) for shape in ((9, 8), (9, 16), (18, 3, 8), (18, 3, 16)))
    step = flops(lambda: thought_decode(torch.randn(1, 4, 18, 8), k_text, v_text, k_own, v_own, layout, 1))
    assert step == 2 * (8 + 16) * 4 * 18 * (5 + 2)
