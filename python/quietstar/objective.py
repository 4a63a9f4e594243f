"""The Quiet-STaR objective as functions of tensors: targets, rewards, advantages, losses (sections 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar_kernels import ThoughtLayout

IGNORED = -100


@dataclass(frozen=True)
class Targets:
    """What is predicted, int64, -100 where a target does not count.

    Attributes:
        base: [B,L-1], position t predicts text token t+1.
        mix: [B,P,N,J], thought (p, n) predicts text token anchor + j + 1.
        rewarded: bool [B,P], anchors with all J targets and one more behind them: 0 <= anchor <= L-2-J.
    """

    base: Tensor
    mix: Tensor
    rewarded: Tensor


def make_targets(labels: Tensor, attention_mask: Tensor | None, layout: ThoughtLayout, lookahead: int) -> Targets:
    """A target is ignored where its label is -100, its mask 0, it lies in another document, or its thought row is off."""
    L = layout.L
    labels = labels if attention_mask is None else labels.masked_fill(attention_mask == 0, IGNORED)
    t = torch.arange(L, device=labels.device)
    base = torch.where(layout.lo[:, 1:] <= t[:-1], labels[:, 1:], IGNORED)

    steps = torch.arange(lookahead, device=labels.device)
    anchor = layout.anchor.long()
    target = anchor[:, :, None] + 1 + steps  # [B,P,J]
    inside = target < L
    flat = target.clamp(0, L - 1).flatten(1)
    visible = layout.lo.gather(1, flat).view(target.shape) <= anchor[:, :, None]
    ids = torch.where(inside & visible, labels.gather(1, flat).view(target.shape), IGNORED)
    on = layout.live()[:, :, :, layout.S - lookahead :]  # [B,P,N,J]
    mix = torch.where(on, ids[:, :, None], IGNORED)
    rewarded = (anchor >= 0) & (anchor <= L - 2 - lookahead)
    return Targets(base, mix, rewarded)


def rewards(nll_base: Tensor, nll_mix: Tensor, targets: Targets, layout: ThoughtLayout, kind: str) -> Tensor:
    """[B,P,N], 0 at anchors that are not rewarded; no gradient.

    ``gain``: sum over j of nll_base[t+j] - nll_mix[n,t,j]. ``likelihood``: minus the sum of nll_mix (equations 1 and 2).
    """
    nll_mix, counts = nll_mix.detach(), targets.mix != IGNORED
    if kind == "gain":
        steps = torch.arange(nll_mix.shape[-1], device=nll_mix.device)
        index = (layout.anchor.long()[:, :, None] + steps).clamp(0, nll_base.shape[1] - 1)
        base = nll_base.detach().gather(1, index.flatten(1)).view(index.shape)[:, :, None]
    else:
        base = torch.zeros((), device=nll_mix.device)
    gain = torch.where(counts, base - nll_mix, 0).sum(-1)
    return torch.where(targets.rewarded[:, :, None], gain, 0)


def _relu(reward: Tensor) -> Tensor:
    return torch.relu(reward - reward.mean(-1, keepdim=True) if reward.shape[-1] > 1 else reward)


def _mean(reward: Tensor) -> Tensor:
    return reward - reward.mean(-1, keepdim=True)


def _leave_one_out(reward: Tensor) -> Tensor:
    N = reward.shape[-1]
    return _mean(reward) * (N / (N - 1))


def _zscore(reward: Tensor) -> Tensor:
    return _mean(reward) / (reward.std(-1, keepdim=True) + 1e-6)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": _relu,  # the published code: above the mean of the N thoughts, negative ones dropped
    "mean": _mean,
    "leave_one_out": _leave_one_out,  # against the mean of the others
    "zscore": _zscore,
}


@dataclass(frozen=True)
class Counts:
    """How many terms each mean of the objective is taken over; those of several batches add up, so that any split of a batch
    over ranks or accumulation steps gives the loss of the whole.

    Attributes:
        base: base targets, 0-d.
        mix: mixed targets for each j, [J].
        places: rewarded anchors times thoughts, 0-d; padded anchors count, unused places don't.
    """

    base: Tensor
    mix: Tensor
    places: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.base + other.base, self.mix + other.mix, self.places + other.places)


def count(targets: Targets) -> Counts:
    base, mix = (targets.base != IGNORED).sum(), (targets.mix != IGNORED).sum((0, 1, 2))
    return Counts(base, mix, targets.rewarded.sum() * targets.mix.shape[2])


def cross_entropy(nll_base: Tensor, nll_mix: Tensor, counts: Counts, base_weight: float, mix_weight: float) -> Tensor:
    """base_weight * mean(nll_base) + mix_weight / J * sum over j of mean(nll_mix[..., j]); a mean over nothing is 0.

    Args:
        nll_base: [B,L-1], 0 where a target does not count.
        nll_mix: [B,P,N,J], likewise.
    """
    base = nll_base.sum() / counts.base.clamp(min=1)
    mix = nll_mix.sum((0, 1, 2)) / counts.mix.clamp(min=1)
    return base_weight * base + mix_weight * mix.mean()


def policy_loss(logprob: Tensor, advantage: Tensor, counts: Counts) -> Tensor:
    """REINFORCE: minus the mean of advantage * logprob over rewarded anchors, thoughts and sampled tokens.

    Args:
        logprob: [B,P,N,T], of the sampled tokens; carries the gradient.
        advantage: [B,P,N], 0 at anchors that are not rewarded.
    """
    return -(advantage[..., None] * logprob).sum() / (counts.places * logprob.shape[-1]).clamp(min=1)
