"""What an op hands to its back ends as one argument. The registered operators are flat: their schemas know no structs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionOptions(NamedTuple):
    """Options of ``thought_attention`` and ``thought_decode``, as documented there; the default scale is filled in."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [H]


class Head(NamedTuple):
    """A language-model head, and how its logits become a distribution, as ``linear_logprob`` documents it."""

    weight: Tensor  # [V,D]
    bias: Tensor | None  # [V]
    scale: float | None
    softcap: float | None
    temperature: float
    banned: list[int]


class Saved(NamedTuple):
    """What the forward of ``linear_logprob`` saves for its backward.

    Attributes:
        entropy: [R]; 0 if it was not asked for.
        largest: [R], the largest logit.
        log_total: [R], the log of the sum of exp(logit - largest). The two are the LSE of the logits; their sum would round.
        kept: the logits, in a form of the back end's own; None if it kept none.
        kept_rows: what the back end keeps of each row besides.
    """

    entropy: Tensor
    largest: Tensor
    log_total: Tensor
    kept: Tensor | None = None
    kept_rows: Tensor | None = None
