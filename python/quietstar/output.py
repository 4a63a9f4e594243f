"""The output of the wrapper's forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class QuietStarOutput(ModelOutput):
    """Output of ``QuietStar.forward``. All fp32; undefined positions hold 0.

    Attributes:
        loss: loss_ce + policy_weight * policy_loss, plus the loss of a gate in training.
        loss_ce: base_weight * mean base + mix_weight * mean mixed cross entropy, nats.
        policy_loss: the terms of the policy, before ``policy_weight``.
        nll_base: [B,L-1], -log p_base of text token t+1, nats.
        nll_mix: [B,P,N,J], -log p_mix of text token anchor+j+1, nats.
        weight: [B,P,N,J], mixing weight on the thought.
        reward: [B,P,N], nats, no gradient.
        advantage: [B,P,N], no gradient.
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N], sampled tokens of each thought; None where all have T.
        logprob: [B,P,N,T], of the thoughts at the policy temperature, no gradient; ``old_logprob`` for further updates.
        base_logprob: [B,P,N,T], of the thoughts as the base model's continuation of the text; None where kl_weight is 0.
        anchors: integer [B,P], the positions that think; None for all.
    """

    loss: Tensor = None  # type: ignore[assignment]
    loss_ce: Tensor = None  # type: ignore[assignment]
    policy_loss: Tensor = None  # type: ignore[assignment]
    nll_base: Tensor = None  # type: ignore[assignment]
    nll_mix: Tensor = None  # type: ignore[assignment]
    weight: Tensor = None  # type: ignore[assignment]
    reward: Tensor = None  # type: ignore[assignment]
    advantage: Tensor = None  # type: ignore[assignment]
    thought_ids: Tensor = None  # type: ignore[assignment]
    thought_lengths: Tensor | None = None
    logprob: Tensor = None  # type: ignore[assignment]
    base_logprob: Tensor | None = None
    anchors: Tensor | None = None
