"""For testing these kernels and code that uses them: a tolerance rule, the ops in plain PyTorch, and random inputs.

    generator = torch.Generator().manual_seed(0)
    layout = random_layout(generator)
    inputs = attention_inputs(generator, layout)
    grad_out = torch.randn(..., generator=generator)
    assert_op_close_as_plain(my_attention, plain_attention, inputs, (grad_out,), layout=layout)

All random numbers come from a ``torch.Generator`` on CPU, so that a seed gives the same test on every device.
"""

from .inputs import attention_inputs, decode_inputs, logprob_inputs, sample_inputs
from .layouts import BRANCH_KINDS, LAYOUT_KINDS, random_layout
from .plain import (
    plain_attention,
    plain_decode,
    plain_divergence,
    plain_gated,
    plain_log_softmax,
    plain_logprob,
    plain_norm,
    plain_rotary,
)
from .tolerance import assert_close_as_plain, assert_op_close_as_plain, attention_magnitudes, forward_backward

__all__ = [
    "BRANCH_KINDS",
    "LAYOUT_KINDS",
    "assert_close_as_plain",
    "assert_op_close_as_plain",
    "attention_inputs",
    "attention_magnitudes",
    "decode_inputs",
    "forward_backward",
    "logprob_inputs",
    "plain_attention",
    "plain_decode",
    "plain_divergence",
    "plain_gated",
    "plain_log_softmax",
    "plain_logprob",
    "plain_norm",
    "plain_rotary",
    "random_layout",
    "sample_inputs",
]
