"""sample_token on CPUs: the reference, a bounded number of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels import reference
from quietstar_kernels._options import Head
from quietstar_kernels.cpu._head import row_chunks


def sample_token(hidden: Tensor, head: Head, counters: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.sample_token``: the same draws, since a row's draw depends on its own counters alone."""
    ids = hidden.new_empty(len(hidden), dtype=torch.int64)
    logprob = hidden.new_empty(len(hidden), dtype=torch.float32)
    head = head._replace(weight=reference.wide(head.weight))
    for rows in row_chunks(len(hidden), len(head.weight)):
        ids[rows], logprob[rows] = reference.sample_token(hidden[rows], head, counters[rows], seed)
    return ids, logprob
