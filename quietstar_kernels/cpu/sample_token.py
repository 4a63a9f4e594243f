"""sample_token on CPUs: the reference, a bounded number of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels import reference
from quietstar_kernels.cpu._head import row_chunks


def sample_token(
    hidden: Tensor,
    weight: Tensor,
    counters: Tensor,
    seed: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: list[int],
) -> tuple[Tensor, Tensor]:
    """As ``reference.sample_token``: the same draws, since they hang on the counters of each row alone."""
    ids = hidden.new_empty(len(hidden), dtype=torch.int64)
    logprob = hidden.new_empty(len(hidden), dtype=torch.float32)
    weight = reference.wide(weight)
    for rows in row_chunks(len(hidden), len(weight)):
        ids[rows], logprob[rows] = reference.sample_token(
            hidden[rows], weight, counters[rows], seed, bias, scale, softcap, temperature, banned
        )
    return ids, logprob
