"""sample_token on CPUs: a library's product, and csrc/cpu/sample.hpp, which draws from the logits in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._options import Head
from . import _library
from ._head import row_chunks
from .products import multiply


def sample_token(hidden: Tensor, head: Head, counters: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Implements ``reference.sample_token``, some rows at a time: a row's draw depends only on its own counters."""
    ids = hidden.new_empty(len(hidden), dtype=torch.int64)
    logprob = hidden.new_empty(len(hidden), dtype=torch.float32)
    head = head._replace(weight=reference.wide(head.weight))
    draw = _draw if _library.serves(hidden.dtype) else reference.sample_token
    for rows in row_chunks(len(hidden), len(head.weight)):
        ids[rows], logprob[rows] = draw(hidden[rows], head, counters[rows], seed)
    return ids, logprob


def _draw(hidden: Tensor, head: Head, counters: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias, scale, softcap, temperature, banned = head
    logits = multiply(hidden.float(), weight.T)
    ids, logprob = hidden.new_empty(len(hidden), dtype=torch.int64), logits.new_empty(len(hidden))
    _library.ops().sample_token(
        logits,
        None if bias is None else bias.float().contiguous(),
        counters.contiguous(),
        torch.tensor(banned) if banned else None,
        seed,
        ids,
        logprob,
        1.0 if scale is None else scale,
        softcap or 0.0,
        temperature,
    )
    return ids, logprob
