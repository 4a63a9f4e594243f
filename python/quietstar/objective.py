"""The Quiet-STaR objective as functions of tensors: targets, rewards, advantages, losses (sections 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        sampled: int64 [B,P,N], sampled tokens of each thought; T where an anchor is off, since padded anchors count in a mean.
    """

    base: Tensor
    mix: Tensor
    rewarded: Tensor
    sampled: Tensor

    def select(self, places: slice) -> Targets:
        """Those of some of the anchors, with every base target."""
        return Targets(self.base, self.mix[:, places], self.rewarded[:, places], self.sampled[:, places])


def make_targets(labels: Tensor, attention_mask: Tensor | None, layout: ThoughtLayout, lookahead: int) -> Targets:
    """A target is ignored where its label is -100, its mask 0, it lies in another document, or its thought is off.

    The last J live rows of a thought predict, those before them are start and sampled tokens.
    """
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
    on = layout.live()[:, :, :, 0]
    mix = torch.where(on[..., None], ids[:, :, None], IGNORED)
    rewarded = (anchor >= 0) & (anchor <= L - 2 - lookahead)
    sampled = torch.where(on, layout.length.long(), layout.S) - lookahead - 1
    return Targets(base, mix, rewarded, sampled)


def at_anchors(nll_base: Tensor, layout: ThoughtLayout, lookahead: int) -> Tensor:
    """nll_base [B,L-1] at the targets of each anchor, t + j: [B,P,J]."""
    steps = torch.arange(lookahead, device=nll_base.device)
    index = (layout.anchor.long()[:, :, None] + steps).clamp(0, nll_base.shape[1] - 1)
    return nll_base.gather(1, index.flatten(1)).view(index.shape)


def rewards(nll_base: Tensor, nll_mix: Tensor, targets: Targets, kind: str) -> Tensor:
    """[B,P,N], 0 at anchors that are not rewarded; no gradient.

    ``gain``: sum over j of nll_base[t+j] - nll_mix[n,t,j]. ``likelihood``: minus the sum of nll_mix (equations 1 and 2).

    Args:
        nll_base: [B,P,J], of the base model at the targets of ``nll_mix`` [B,P,N,J].
    """
    nll_mix, counts = nll_mix.detach(), targets.mix != IGNORED
    base = nll_base.detach()[:, :, None] if kind == "gain" else torch.zeros((), device=nll_mix.device)
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


# A reward [..., N] to an advantage [..., N], over the N thoughts of an anchor.
ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": _relu,  # the published code: above the mean of the N thoughts, negative ones dropped
    "mean": _mean,  # the same, negative ones kept
    "leave_one_out": _leave_one_out,  # against the mean of the others (RLOO, arXiv 2402.14740)
    "zscore": _zscore,  # in deviations of the group (GRPO, arXiv 2402.03300)
}


@dataclass(frozen=True)
class Counts:
    """How many terms each mean of the objective is taken over; those of several batches add up, so that any split of a batch
    over ranks or accumulation steps gives the loss of the whole.

    Attributes:
        base: base targets, 0-d.
        mix: mixed targets for each j, [J].
        places: rewarded anchors times thoughts, 0-d; padded anchors count, unused places don't.
        tokens: sampled tokens of those thoughts, 0-d.
    """

    base: Tensor
    mix: Tensor
    places: Tensor
    tokens: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.base + other.base, self.mix + other.mix, self.places + other.places, self.tokens + other.tokens)


def count(targets: Targets) -> Counts:
    base, mix = (targets.base != IGNORED).sum(), (targets.mix != IGNORED).sum((0, 1, 2))
    tokens = torch.where(targets.rewarded[:, :, None], targets.sampled, 0).sum()
    return Counts(base, mix, targets.rewarded.sum() * targets.mix.shape[2], tokens)


def cross_entropy(nll_base: Tensor, nll_mix: Tensor, counts: Counts, base_weight: float, mix_weight: float) -> Tensor:
    """base_weight * mean(nll_base) + mix_weight / J * sum over j of mean(nll_mix[..., j]); a mean over nothing is 0.

    Args:
        nll_base: [B,L-1], 0 where a target does not count.
        nll_mix: [B,P,N,J], likewise.
    """
    base = nll_base.sum() / counts.base.clamp(min=1)
    mix = nll_mix.sum((0, 1, 2)) / counts.mix.clamp(min=1)
    return base_weight * base + mix_weight * mix.mean()


@dataclass(frozen=True)
class Sampled:
    """What the policy's terms look at: the sampled tokens, [B,P,N,T] where nothing else is said.

    Attributes:
        logprob: at the policy temperature; carries the gradient.
        advantage: [B,P,N].
        on: bool, tokens that are live and stand at a rewarded anchor.
        old_logprob: ``logprob`` when the tokens were sampled, no gradient; None: now.
        base_logprob: under the plain language model that goes on with the text, no gradient; only ``divergence`` reads it.
        ratio_clip: PPO's epsilon; only ``clipped`` reads it.
    """

    logprob: Tensor
    advantage: Tensor
    on: Tensor
    old_logprob: Tensor | None = None
    base_logprob: Tensor | None = None
    ratio_clip: float = 0.2

    def ratio(self) -> Tensor:
        """Probability now over probability when sampled; 1, with the gradient of ``logprob``, in the first update."""
        return (self.logprob - (self.logprob.detach() if self.old_logprob is None else self.old_logprob)).exp()


def reinforce(sampled: Sampled) -> Tensor:
    """advantage * log pi (Williams, 1992), the published term."""
    return sampled.advantage[..., None] * sampled.logprob


def clipped(sampled: Sampled) -> Tensor:
    """min(ratio * advantage, clip(ratio, 1 - eps, 1 + eps) * advantage), for each token (PPO, arXiv 1707.06347, equation 7)."""
    ratio, advantage = sampled.ratio(), sampled.advantage[..., None]
    return torch.minimum(ratio * advantage, ratio.clamp(1 - sampled.ratio_clip, 1 + sampled.ratio_clip) * advantage)


def divergence(sampled: Sampled) -> Tensor:
    """Its expected gradient is that of -KL(pi || base) over whole thoughts: k1 = log pi - log base as a reward.

    k1 as a reward is the estimator whose gradient is the divergence's; k3 as a loss has another one (arXiv 2510.01555).
    """
    assert sampled.base_logprob is not None
    return -sampled.ratio() * _rest_of_thought(sampled.logprob.detach() - sampled.base_logprob, sampled.on)


def entropy(sampled: Sampled) -> Tensor:
    """Its expected gradient is that of the entropy of whole thoughts, for -log pi as a reward."""
    return -sampled.ratio() * _rest_of_thought(sampled.logprob.detach(), sampled.on)


def _rest_of_thought(cost: Tensor, on: Tensor) -> Tensor:
    """[B,P,N,T]: what token s brings from itself to its thought's end, against the mean of the other thoughts if there are."""
    cost = torch.where(on, cost, 0)
    rest = cost.flip(-1).cumsum(-1).flip(-1)
    return _leave_one_out(rest.transpose(2, 3)).transpose(2, 3) if rest.shape[2] > 1 else rest


POLICY_TERMS: dict[str, Callable[[Sampled], Tensor]] = {
    "reinforce": reinforce,
    "clipped": clipped,
    "divergence": divergence,
    "entropy": entropy,
}


def policy_loss(sampled: Sampled, counts: Counts, weights: Mapping[str, float]) -> Tensor:
    """Minus the mean over the sampled tokens of rewarded anchors' thoughts of the weighted sum of ``POLICY_TERMS``.

    Args:
        weights: of the terms that take part, by name.
    """
    total = torch.stack([weight * POLICY_TERMS[name](sampled) for name, weight in weights.items()]).sum(0)
    return -torch.where(sampled.on, total, 0).sum() / counts.tokens.clamp(min=1)


def gate_loss(probability: Tensor, reward: Tensor, targets: Targets, cost: float, counts: Counts) -> Tensor:
    """REINFORCE for the choice to think: minus the sum over anchors of (mean reward - cost) * log g, per text target.

    Not to think earns 0, so positions that don't think add nothing, and the expected gradient is that of the mean over the text
    of g * (reward - cost).

    Args:
        probability: [B,P], g at the anchors, with which they were chosen; carries the gradient.
        reward: [B,P,N].
        cost: of a thinking position, nats.
    """
    gain = torch.where(targets.rewarded, (reward.mean(-1) - cost) * probability.log(), 0)
    return -gain.sum() / counts.base.clamp(min=1)
