"""sample_token in CUDA, csrc/sample_token.cu: cuBLAS computes the logits of a chunk of the vocabulary, a kernel reduces them.

A chunk is small enough to stay in L2, and each row carries its best block so far from chunk to chunk. The score of a block
depends only on its own logits, so that chunks of any size draw the same ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._options import Head
from ..checks import dtype_names
from ..reference import BLOCK
from . import _library

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOGITS = 2**22  # in a chunk: 16 MB of fp32, a tile of the product for each processor of a large GPU
ROWS = 2048  # of a chunk at most: with more, it would be too narrow for a fast product


def serves(dtype: torch.dtype, **widths: int) -> str | None:
    """None if this back end computes in ``dtype``; else the reason, in words."""
    return None if dtype in DTYPES else f"it computes in {dtype_names(DTYPES)}, not in {dtype_names([dtype])}"


def sample_token(hidden: Tensor, head: Head, counters: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Implements ``reference.sample_token``, for what ``serves`` does not refuse."""
    hidden, head = head.with_positive_scale(hidden)
    weight, bias, scale, softcap, temperature, banned = head
    R, V = len(hidden), len(weight)
    ids, logprob = hidden.new_empty(R, dtype=torch.int64), hidden.new_empty(R, dtype=torch.float32)
    if R == 0:
        return ids, logprob
    if bias is not None:
        bias = torch.empty_like(bias, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(bias)
    state = hidden.new_empty(R, 4, dtype=torch.float32)
    buffer = hidden.new_empty(min(LOGITS, R * padded(V)), dtype=torch.float32)
    options = (1.0 if scale is None else scale, softcap or 0.0, temperature)
    reduce = _library.ops()._sample_token_cuda
    for rows in map(slice, range(0, R, ROWS), range(ROWS, R + ROWS, ROWS)):
        part = hidden[rows]
        carried = (counters[rows], state[rows], ids[rows], logprob[rows])
        width = min(LOGITS // len(part) // BLOCK * BLOCK, padded(V))
        chunk = buffer[: len(part) * width].view(len(part), width)
        for first in range(0, V, width):
            last = min(first + width, V)
            logits = chunk[:, : last - first]
            product(part, weight[first:last], logits)
            for token in banned:
                if first <= token < last:
                    logits[:, token - first].sub_(math.inf)
            reduce(logits, None if bias is None else bias[first:last], *carried, seed, first, *options)
    return ids, logprob


def product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden weight^T in fp32, whatever their dtype."""
    torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)


def padded(V: int) -> int:
    """V rounded up to whole blocks."""
    return -(-V // BLOCK) * BLOCK
