"""The Quiet-STaR objective as functions of tensors: targets, rewards, advantages, losses (sections 4.3 and 4.4), and leaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch
from torch import Tensor

from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import IGNORED

# How many of the next tokens, one after another, make a leak: one or two occur in long thoughts by chance.
LEAK = 4
# Rewards of an anchor that differ by less are equal up to rounding, nats.
SPREAD = 1e-6


def sampled(thought_lengths: Tensor, thought_tokens: int) -> Tensor:
    """bool [B,P,N,T], True up to each thought's end."""
    return torch.arange(thought_tokens, device=thought_lengths.device) < thought_lengths[..., None]


@dataclass(frozen=True)
class Targets:
    """Token ids to predict, int64; -100 where a target does not count."""

    base: Tensor  # [B,L-1], position t predicts text token t+1
    mix: Tensor  # [B,P,N,J], thought (p, n) predicts text token anchor + j + 1
    rewarded: Tensor  # bool [B,P], anchors whose thoughts get a reward
    sampled: Tensor  # int64 [B,P,N], number of sampled tokens in each thought; T at unused anchors, which count in the means
    earning: Tensor  # bool [B,P,N,J], mixed targets that count in a reward
    on: Tensor  # bool [B,P,N,T], sampled tokens of the thoughts that get a reward
    spread: Tensor  # fp32 [B,P], rewards of an anchor that differ by no more are equal; below 0 at those that are not rewarded

    def select(self, anchors: slice) -> Targets:
        """The targets of some of the anchors, with all base targets."""
        return Targets(self.base, *(getattr(self, x.name)[:, anchors] for x in fields(self)[1:]))


def following(labels: Tensor, layout: ThoughtLayout, count: int = LEAK) -> Tensor:
    """The labels after each anchor, int64 [B,P,count]; -100 where there is none in the anchor's document, or no anchor.

    Args:
        labels: int64 [B,L], -100 on padding.
    """
    anchor = layout.anchor.long()[:, :, None]
    place = anchor + 1 + torch.arange(count, device=labels.device)
    flat = place.clamp(max=layout.L - 1).flatten(1)
    there = (anchor >= 0) & (place < layout.L) & (layout.lo.gather(1, flat).view(place.shape) <= anchor)
    return torch.where(there, labels.gather(1, flat).view(place.shape), IGNORED)


def make_targets(labels: Tensor, layout: ThoughtLayout, lookahead: int, all_known: bool = False) -> Targets:
    """The targets of a batch.

    A target is ignored if its label is -100, as on padding, it is in another document, or its thought is off. The last J live
    rows of a thought predict; the rows before them are the start and the sampled tokens.

    Args:
        all_known: reward the anchors whose J targets all count. Otherwise those that the published code rewards: followed by
            J tokens and one more, whatever they are, 0 <= anchor <= L-2-J.
    """
    L = layout.L
    t = torch.arange(L, device=labels.device)
    base = torch.where(layout.lo[:, 1:] <= t[:-1], labels[:, 1:], IGNORED)

    anchor, ids = layout.anchor.long(), following(labels, layout, lookahead)
    live = layout.live()[:, :, :, 0]
    mix = torch.where(live[..., None], ids[:, :, None], IGNORED)
    rewarded = (mix != IGNORED).all(-1).any(-1) if all_known else (anchor >= 0) & (anchor <= L - 2 - lookahead)
    lengths = torch.where(live, layout.length.long(), layout.S) - lookahead - 1
    earning = (mix != IGNORED) & rewarded[:, :, None, None]
    on = sampled(lengths, layout.S - lookahead - 1) & (live & rewarded[:, :, None])[..., None]
    spread = torch.where(rewarded, SPREAD, -1.0)
    return Targets(base, mix, rewarded, lengths, earning, on, spread)


def places_ahead(layout: ThoughtLayout, lookahead: int, size: int) -> Tensor:
    """int64 [B,P,J], the positions t to t + J - 1 for each anchor t, which predict its J targets; from 0 to ``size`` - 1."""
    steps = torch.arange(lookahead, device=layout.device)
    return (layout.anchor.long()[:, :, None] + steps).clamp(0, size - 1)


def at_places(nll_base: Tensor, places: Tensor) -> Tensor:
    """``nll_base`` [B,L-1] at ``places`` [B,P,J]."""
    return nll_base.gather(1, places.flatten(1)).view(places.shape)


# The first line of each docstring below is shown in ``quietstar train --help``.


def _gain(nll_base: Tensor, nll_mix: Tensor) -> Tensor:
    """log-likelihood of the next tokens minus that of the base model"""
    return nll_base - nll_mix


def _likelihood(nll_base: Tensor, nll_mix: Tensor) -> Tensor:
    """log-likelihood of the next tokens"""
    return -nll_mix


# Base and mixed negative log-likelihood of each target, [B,P,1,J] and [B,P,N,J], to the reward for it, [B,P,N,J].
REWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gain": _gain,  # the published code
    "likelihood": _likelihood,  # equations 1 and 2 of the paper
}

# The other reward, which reads the thought instead of the model's prediction after it.
MATCH = "1 if the thought's prediction is how the text goes on, else 0"

# Rewards that are 0 for a thought that changes nothing. The others mean something only next to other thoughts' rewards.
RELATIVE_TO_BASE = ("gain",)


def rewards(nll_base: Tensor, nll_mix: Tensor, targets: Targets, kind: str, discount: float = 1.0) -> Tensor:
    """The reward of each thought, summed over its targets: [B,P,N]; 0 at anchors that are not rewarded, no gradient.

    Args:
        nll_base: [B,P,J], of the base model at the targets of ``nll_mix``.
        nll_mix: [B,P,N,J].
        discount: the weight of target j is its j-th power.
    """
    reward = REWARDS[kind](nll_base.detach()[:, :, None], nll_mix.detach())
    if discount != 1:
        reward = reward * discount ** torch.arange(reward.shape[-1], dtype=reward.dtype, device=reward.device)
    return (reward * targets.earning).sum(-1)


def dead_groups(reward: Tensor, targets: Targets) -> Tensor:
    """bool [B,P], rewarded anchors whose thoughts, 2 or more, earn the same, [B,P,N]: they say nothing about each other."""
    if reward.shape[-1] == 1:
        return torch.zeros_like(targets.rewarded)
    least, most = reward.aminmax(dim=-1)
    return most - least <= targets.spread


def _relu(reward: Tensor) -> Tensor:
    """reward above the mean of the N thoughts, 0 if it is below"""
    return torch.relu(reward - reward.mean(-1, keepdim=True) if reward.shape[-1] > 1 else reward)


def _mean(reward: Tensor) -> Tensor:
    """reward minus the mean of the N thoughts"""
    return reward - reward.mean(-1, keepdim=True)


def _leave_one_out(reward: Tensor) -> Tensor:
    """reward minus the mean of the other thoughts (RLOO)"""
    N = reward.shape[-1]
    return _mean(reward) * (N / (N - 1))


def _zscore(reward: Tensor) -> Tensor:
    """reward minus the mean, in standard deviations of the N rewards (GRPO)"""
    return _mean(reward) / (reward.std(-1, keepdim=True) + 1e-6)


# Rewards [..., N] to advantages [..., N], over the N thoughts of an anchor.
ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": _relu,  # the published code
    "mean": _mean,
    "leave_one_out": _leave_one_out,  # arXiv 2402.14740
    "zscore": _zscore,  # arXiv 2402.03300
}


def advantages(reward: Tensor, dead: Tensor, kind: str) -> Tensor:
    """The advantage of each thought over the others at its anchor: [B,P,N] from rewards [B,P,N].

    It is 0 in ``dead`` groups [B,P], and at anchors that are not rewarded, whose rewards are all 0.
    """
    return ADVANTAGES[kind](reward).masked_fill(dead[..., None], 0)


@dataclass(frozen=True)
class Counts:
    """The number of terms in each mean of the objective.

    Counts of several batches add up, so a batch split over ranks or accumulation steps gives the same loss as the whole.

    Attributes:
        values: int64 [4+J], all of them: one tensor to move, add and reduce.
        base: base targets, 0-d.
        places: rewarded anchors times thoughts, 0-d; anchors on padding count, unused ones don't.
        tokens: sampled tokens of those thoughts, 0-d.
        thoughts: those of these thoughts that have a token, 0-d.
        mix: mixed targets for each j, [J].
    """

    values: Tensor

    base = property(lambda self: self.values[0])
    places = property(lambda self: self.values[1])
    tokens = property(lambda self: self.values[2])
    thoughts = property(lambda self: self.values[3])
    mix = property(lambda self: self.values[4:])

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.values + other.values)

    def divisors(self) -> Counts:
        """What means are divided by: at least 1, so that a mean over nothing is 0."""
        return Counts(self.values.clamp(min=1))


def count(targets: Targets) -> Counts:
    """The counts of one batch."""
    base, mix = (targets.base != IGNORED).sum(), (targets.mix != IGNORED).sum((0, 1, 2))
    tokens = torch.where(targets.rewarded[:, :, None], targets.sampled, 0)
    places = targets.rewarded.sum() * targets.mix.shape[2]
    return Counts(torch.cat([torch.stack([base, places, tokens.sum(), (tokens > 0).sum()]), mix]))


def cross_entropy(nll_base: Tensor, nll_mix: Tensor, counts: Counts, base_weight: float, mix_weight: float) -> Tensor:
    """base_weight * mean(nll_base) + mix_weight / J * sum over j of mean(nll_mix[..., j]).

    Args:
        nll_base: [B,L-1], 0 where a target does not count.
        nll_mix: [B,P,N,J], 0 where a target does not count.
        counts: ``Counts.divisors``.
        base_weight, mix_weight: 0 leaves the term out.
    """
    loss = _times(base_weight, nll_base.sum() / counts.base) if base_weight else nll_base.new_zeros(())
    return torch.add(loss, (nll_mix.sum((0, 1, 2)) / counts.mix).mean(), alpha=mix_weight) if mix_weight else loss


def _times(weight: float, term: Tensor) -> Tensor:
    return term if weight == 1 else weight * term


@dataclass(frozen=True)
class Sampled:
    """The sampled tokens, input of the policy terms. Shapes are [B,P,N,T] unless stated otherwise."""

    logprob: Tensor  # at the policy temperature; carries the gradient
    advantage: Tensor  # [B,P,N]
    on: Tensor  # bool, live tokens at a rewarded anchor
    old_logprob: Tensor | None = None  # ``logprob`` when the tokens were sampled, no gradient; None means ``logprob`` itself
    base_logprob: Tensor | None = None  # under the base model continuing the text, no gradient; used by ``divergence`` only
    ratio_clip: tuple[float, float] = (0.2, 0.2)  # PPO's epsilon below and above 1; used by ``clipped`` only

    def ratio(self) -> Tensor:
        """Probability now divided by probability when sampled. In the first update 1, with the gradient of ``logprob``."""
        return (self.logprob - (self.logprob.detach() if self.old_logprob is None else self.old_logprob)).exp()


def reinforce(sampled: Sampled) -> Tensor:
    """advantage * log pi (Williams, 1992): the published term."""
    return sampled.advantage[..., None] * sampled.logprob


def clipped(sampled: Sampled) -> Tensor:
    """min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage) for each token (PPO, arXiv 1707.06347, equation 7)."""
    ratio, advantage = sampled.ratio(), sampled.advantage[..., None]
    low, high = sampled.ratio_clip
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def divergence(sampled: Sampled) -> Tensor:
    """Has the expected gradient of -KL(pi || base) over whole thoughts: k1 = log pi - log base, used as a reward.

    k1 as a reward is an estimator with the gradient of the divergence; k3 as a loss has a different one (arXiv 2510.01555).
    """
    assert sampled.base_logprob is not None
    return -sampled.ratio() * _rest_of_thought(sampled.logprob.detach() - sampled.base_logprob, sampled.on)


def entropy(sampled: Sampled) -> Tensor:
    """Has the expected gradient of the entropy of whole thoughts: -log pi, used as a reward."""
    return -sampled.ratio() * _rest_of_thought(sampled.logprob.detach(), sampled.on)


def _rest_of_thought(cost: Tensor, on: Tensor) -> Tensor:
    """[B,P,N,T], cost summed from each token to its thought's end, minus the mean of the other thoughts if there are any."""
    cost = torch.where(on, cost, 0)
    rest = cost.flip(-1).cumsum(-1).flip(-1)
    return _leave_one_out(rest.transpose(2, 3)).transpose(2, 3) if rest.shape[2] > 1 else rest


POLICY_TERMS: dict[str, Callable[[Sampled], Tensor]] = {
    "reinforce": reinforce,
    "clipped": clipped,
    "divergence": divergence,
    "entropy": entropy,
}


def policy_loss(sampled: Sampled, counts: Counts, weights: Mapping[str, float], token_mean: str = "tokens") -> Tensor:
    """Minus the weighted sum of ``POLICY_TERMS``, averaged over the sampled tokens at rewarded anchors.

    Args:
        counts: ``Counts.divisors``.
        token_mean: "tokens", over all of them; or "thought", over those of each thought, and then over thoughts that have any.
    """
    total = reduce(add, (_times(weight, POLICY_TERMS[name](sampled)) for name, weight in weights.items())) * sampled.on
    if token_mean == "thought":
        return (total.sum(-1) / sampled.on.sum(-1).clamp(min=1)).sum() / -counts.thoughts
    return total.sum() / -counts.tokens


def gate_loss(probability: Tensor, reward: Tensor, targets: Targets, cost: float, counts: Counts) -> Tensor:
    """REINFORCE for the decision to think: minus the sum over anchors of (mean reward - cost) * log g, per text target.

    Not thinking earns 0, so positions without a thought contribute nothing. The expected gradient is that of the mean of
    g * (reward - cost) over the text.

    Args:
        probability: [B,P], g, the probability with which each anchor was chosen; carries the gradient.
        reward: [B,P,N].
        cost: cost of thinking at a position, nats.
        counts: ``Counts.divisors``.
    """
    gain = torch.where(targets.rewarded, (reward.mean(-1) - cost) * probability.log(), 0)
    return -gain.sum() / counts.base


def leaks(thought_ids: Tensor, on: Tensor | None, following: Tensor) -> Tensor:
    """bool [B,P,N]: whether a thought has the next 4 tokens of the text, one after another, anywhere among its sampled tokens.

    False where fewer than 4 are known. A likelihood reward is gamed by such thoughts (arXiv 2506.08007, section 5, says so of
    Quiet-STaR), so their share is an alarm.

    Args:
        thought_ids: int64 [B,P,N,T].
        on: bool [B,P,N,T], True up to each thought's end; None where all have T tokens.
        following: int64 [B,P,F], the next tokens, -100 where there is none.
    """
    if thought_ids.shape[-1] < LEAK or following.shape[-1] < LEAK:
        return torch.zeros_like(thought_ids[..., 0], dtype=torch.bool)
    same = (thought_ids.unfold(-1, LEAK, 1) == following[:, :, None, None, :LEAK]).all(-1)  # [B,P,N,starts]
    return (same if on is None else same & on[..., LEAK - 1 :]).any(-1)
