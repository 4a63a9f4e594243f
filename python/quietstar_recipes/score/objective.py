"""What both attempts earn in SCoRe's stages, and the loss of an update (arXiv 2409.12917)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import option
from quietstar_kernels.checks import check_at_least, check_types
from quietstar_recipes.common.branches import Ids, may_share
from quietstar_recipes.common.logprobs import completion_logits, likelihoods, logprob
from quietstar_recipes.score.attempts import Attempts

Turn = tuple[Ids, Ids]  # the ids before some completions, and theirs


@dataclass
class Objective:
    """What the attempts earn, and how close the model is kept to the base.

    The bonus and the weights of the divergence are those of the code of BY571/SCoRe. They are said to be the paper's for MATH
    (table 8), and so is no credit across turns (appendix A.4); both are unverified.
    """

    bonus: float = option(10.0, "alpha: the second attempt also earns this times its reward minus the first's; 0 is a control")
    kl: float = option(0.01, "beta 1, weight of the divergence from the base model: both attempts in stage II, the second in I")
    first_kl: float = option(0.1, "beta 2, weight of the divergence of the first attempt in stage I")
    credit: Literal["turn", "joint"] = option("turn", "turn: the first attempt earns its own reward; joint: also the second's")
    single_turn: bool = option(False, "train first attempts alone, by their own reward: a control, without stage I")

    def __post_init__(self) -> None:
        check_types("score", self)
        check_at_least("score", self, 0, ("bonus", "kl", "first_kl"))

    def weights(self, stage: int) -> Tensor:
        """The weights of the divergence of both attempts, [2]."""
        return torch.tensor([self.first_kl if stage == 1 else self.kl, 0.0 if self.single_turn else self.kl])

    def earned(self, right: Tensor, stage: int) -> Tensor:
        """Which attempts are right, [2,R]; 0 for those that earn nothing: in stage I the first, in a single turn the second."""
        return right * torch.tensor([[stage == 2], [not self.single_turn]])

    def returns(self, right: Tensor, stage: int, penalty: Tensor) -> Tensor:
        """What is credited to each attempt, [2,R], given which are right and what is subtracted for the divergence, both [2,R].

        By turn, the second attempt earns (1 + bonus) times its own reward. The paper's bonus also subtracts the first attempt's
        reward, which is the same for every second attempt that follows it: it changes no expected gradient, is nearly half of
        the variance, and is left out, like a baseline. With joint credit the first attempt's return has it.
        """
        first, second = self.earned(right, stage)
        bonus = 0.0 if stage == 1 or self.single_turn else self.bonus
        own = torch.stack([first, (1 + bonus) * second]) - penalty
        if self.credit == "joint":
            own[0] += own[1] - bonus * first
        return own


def log_ratios(base: PreTrainedModel, attempts: Attempts, batch_size: int) -> Tensor:
    """log p(y) - log q(y), [2,R], of whole attempts under the model that wrote them and under the base model.

    Its mean is the divergence. In a reward it also counts that an early token leads to places where the models differ.
    """
    return attempts.logprob - torch.tensor(likelihoods(base, *flat(attempts.turns()), batch_size)).view(2, -1)


def flat(turns: Iterable[Turn]) -> Turn:
    """The prompts and the completions of all turns."""
    prompts, completions = (list(chain(*several)) for several in zip(*turns, strict=True))
    return prompts, completions


def by_turn(model: PreTrainedModel, turns: Sequence[Turn], score: Callable[[Ids, Ids], Tensor]) -> list[Tensor]:
    """A score [R] of each turn's completions, in one pass where that reads once what a second attempt has of the first."""
    prompts, completions = flat(turns)
    if not may_share(model, prompts, completions):
        return [score(*turn) for turn in turns]
    return list(score(prompts, completions).chunk(len(turns)))


def advantages(returns: Tensor, samples: int) -> Tensor:
    """Returns [2,R] minus the mean of the problem's other samples, or of the other problems if there is one sample each."""
    groups = returns.unflatten(1, (-1, samples)) if samples > 1 else returns[:, None]
    n = groups.shape[2]
    return ((groups - groups.mean(2, keepdim=True)) * n / (n - 1)).flatten(1)


def divergence(model: PreTrainedModel, base: PreTrainedModel, prompts: Ids, completions: Ids) -> Tensor:
    """The divergence [R] of the model from the base, summed over the tokens of each completion.

    It is that of the whole distribution at each token, sum over v of p(v) (log p(v) - log q(v)).
    """
    logits, _, mask = completion_logits(model, prompts, completions)
    p, q = (x[:, :-1].log_softmax(-1) for x in (logits, completion_logits(base, prompts, completions)[0]))
    return (p.exp() * (p - q)).sum(-1).where(mask, 0).sum(1)


def loss(model: PreTrainedModel, attempts: Attempts, advantage: Tensor, single_turn: bool) -> Tensor:
    """The loss of each problem [R], for the ``advantage`` [2,R] of both attempts.

    First attempts that the base model wrote are not reinforced, since REINFORCE's gradient is an expectation over the model's
    own samples. They are what the second attempt responds to.
    """
    advantage = (advantage * torch.stack([attempts.own, torch.ones_like(attempts.own)])).to(model.device)
    turns = list(attempts.turns())[: 1 if single_turn else 2]
    chosen = by_turn(model, turns, lambda prompts, completions: logprob(model, prompts, completions)[0].sum(1))
    value = torch.zeros_like(advantage[0])
    for turn, of_turn in enumerate(chosen):
        value = value - advantage[turn] * of_turn
    return value
