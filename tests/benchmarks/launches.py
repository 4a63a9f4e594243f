"""Print, as JSON, what Triton compiles and binds in a few calls of thought_attention with empty kernels."""

import json
import os

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.runtime import JITFunction

from benchmarks.host import empty_kernels
from quietstar_kernels import ThoughtLayout, thought_attention

empty_kernels.install()
made, bound = empty_kernels.EmptyKernel.made, []
run = JITFunction.run


def bind(self, *args, **kwargs):
    bound.append(self.__name__)
    return run(self, *args, **kwargs)


JITFunction.run = bind


def forward(layout, dtype=torch.bfloat16):
    leaves = [torch.randn(layout.B, heads, layout.M, 64, dtype=dtype, requires_grad=True) for heads in (2, 1, 1)]
    return thought_attention(*leaves, layout, backend="triton"), leaves


def counts(step):
    """How many kernels a step compiles, how often Triton binds arguments, and how many kernels it launches."""
    before = len(made), len(bound), empty_kernels.EmptyKernel.launches
    step()
    return [now - then for now, then in zip((len(made), len(bound), empty_kernels.EmptyKernel.launches), before, strict=True)]


def both(layout, dtype=torch.bfloat16):
    out, leaves = forward(layout, dtype)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


whole = ThoughtLayout.every_position(1, 24, 3, 5)
chunks = [whole.select(slice(start, start + 5)) for start in range(0, 20, 5)]
results = {"unaligned": [chunk.anchor.data_ptr() % 16 for chunk in chunks]}
results["forward"] = counts(lambda: forward(chunks[0]))
results["names"] = sorted(made)
results["backward"] = counts(lambda: both(chunks[0]))
results["chunks"] = [counts(lambda chunk=chunk: both(chunk)) for chunk in chunks]
results["again"] = [counts(lambda chunk=chunk: both(chunk)) for chunk in chunks]
results["another dtype"] = counts(lambda: both(chunks[0], torch.float32))
print(json.dumps(results))
