"""What an op hands to its back ends as one argument. The registered operators are flat: their schemas know no structs."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .checks import LARGEST_FP32


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

    @property
    def factors(self) -> tuple[float, float | None]:
        """(inner, outer) of a final logit, outer * tanh(inner * x), or inner * x if outer is None; for temperature 0, at 1."""
        scale, temperature = 1.0 if self.scale is None else self.scale, self.temperature or 1.0
        if self.softcap is None:
            return scale / temperature, None
        return scale / self.softcap, self.softcap / temperature

    @property
    def overflows(self) -> bool:
        """Whether a factor between products and logits in bits is beyond fp32, so that no logit is a number."""
        if self.scale is None and self.softcap is None and not 0 < self.temperature < 1e-30:
            return False
        scale, temperature = abs(1.0 if self.scale is None else self.scale), self.temperature or 1.0
        inner, outer = (scale, scale) if self.softcap is None else (scale / self.softcap, self.softcap)
        return not 2 * math.log2(math.e) * max(scale, inner, outer, 1 / temperature, outer / temperature) <= LARGEST_FP32

    def with_positive_scale(self, hidden: Tensor) -> tuple[Tensor, Head]:
        """Hidden states and a head with the same logits, of which the largest belongs to the largest product."""
        if self.scale is None or self.scale > 0:
            return hidden, self
        sign = -1 if self.scale < 0 else 0
        bias = None if self.bias is None else sign * self.bias
        return sign * hidden, self._replace(bias=bias, scale=abs(self.scale) or 1.0)


class Saved(NamedTuple):
    """What the forward of ``linear_logprob`` saves for its backward; over ranks, entropy and LSE of the whole vocabulary.

    Attributes:
        entropy: [R]; 0 if it was not asked for.
        largest: [R], the largest logit.
        log_total: [R], the log of the sum of exp(logit - largest). The two are the LSE of the logits; their sum would round.
        kept: the logits, in a form of the back end's own; None if it kept none.
        kept_rows: besides, for each row the log-probability of its target, then factors from what is kept to probabilities.
    """

    entropy: Tensor
    largest: Tensor
    log_total: Tensor
    kept: Tensor | None
    kept_rows: Tensor | None
