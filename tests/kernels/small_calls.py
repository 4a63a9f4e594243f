"""One small call of each op, for tests of what serves it."""

import torch

from quietstar_kernels import (
    gated_activation,
    linear_logprob,
    rms_norm,
    rotary,
    rotary_decode,
    sample_token,
    thought_attention,
    thought_decode,
)
from quietstar_kernels.testing import attention_inputs, decode_inputs, logprob_inputs, random_layout, sample_inputs


def call(op, backend="auto", dtype=torch.float32):
    """One output, always for the same inputs."""
    generator = torch.Generator().manual_seed(0)
    layout = random_layout(generator, "every")
    if op == "thought_attention":
        return thought_attention(**attention_inputs(generator, layout, dtype=dtype), layout=layout, backend=backend)
    if op == "thought_decode":
        return thought_decode(**decode_inputs(generator, layout, dtype=dtype), layout=layout, step=0, backend=backend)
    if op == "sample_token":
        return sample_token(**sample_inputs(generator, 3, dtype=dtype), seed=0, backend=backend)[1]
    if op == "linear_logprob":
        return linear_logprob(**logprob_inputs(generator, 3, dtype=dtype), backend=backend)
    x, (cos, sin) = torch.randn(2, 3, 32, generator=generator).to(dtype), torch.randn(2, 1, 3, 8, generator=generator)
    if op == "rms_norm":
        return rms_norm(x, x[0, 0], backend=backend)[1]
    if op == "gated_activation":
        return gated_activation(x, backend=backend)
    if op == "rotary":
        return rotary(x, None, None, cos, sin, (2, 1), backend=backend)[0]
    own = x.new_zeros(2, 2, 1, 3, 2, 8)
    return rotary_decode(x, None, None, cos, sin, (2, 1), *own, 0, backend=backend)
