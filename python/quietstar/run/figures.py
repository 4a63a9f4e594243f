"""The figures of a step: sums over parts and processes, divided by the step's counts."""

from __future__ import annotations

import warnings
from functools import reduce
from operator import add

import torch
from accelerate import Accelerator
from torch import Tensor

from quietstar.objective import Counts
from quietstar.texts import Texts
from quietstar.thinking.forward import QuietStarOutput
from quietstar.thinking.rollout import HostCopy


def sums_of(loss: Tensor, out: QuietStarOutput, part: Texts) -> dict[str, Tensor]:
    """Sums over one part of a step, 0-d. The losses are already divided by the counts of the whole step.

    They stay on the device, since reading one would make the host wait.
    """
    sums = {
        "loss": loss.detach(),
        "loss_ce": out.loss_ce.detach(),
        "policy_loss": out.policy_loss.detach(),
        "reward": out.reward.sum(),
        "advantage": out.advantage.sum(),
        "weight": out.weight.detach()[..., 0].where(out.nll_mix[..., 0] != 0, 0).sum(),
        "tokens": part.tokens(),
        "thoughts": torch.full_like(loss.detach(), out.reward.numel(), dtype=torch.float64),
        "leak_rate": out.leaks.sum(),
        "dead_groups": out.dead.sum() * out.reward.shape[2],
    }
    if out.thought_lengths is not None:
        sums["thought_length"] = out.thought_lengths.sum()
    if out.base_logprob is not None:
        sums["divergence"] = (out.logprob - out.base_logprob).sum()
    if out.anchors is not None:
        sums["anchors"] = (out.anchors >= 0).sum()
        sums["thoughts"] = sums["anchors"] * out.reward.shape[2]
    return sums


def add_up(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of several parts of a process, fp64."""
    return {name: reduce(add, (part[name].double() for part in parts)) for name in parts[0]}


def reduced(accelerator: Accelerator, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all processes."""
    return dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values()))), strict=True))


class Reading:
    """The figures of a step on their way from the device: ``figures`` waits for this step, not for what is queued after it.

    Args:
        sums: over all processes.
        counts: of the whole step.
        norm: gradient norm, 0-d.
    """

    def __init__(self, sums: dict[str, Tensor], counts: Counts, norm: Tensor):
        self._names = sorted(sums)
        values = torch.stack([sums[name] for name in self._names])
        others = [x.to(values) for x in (counts.base, counts.mix[0], counts.places, counts.tokens, norm)]
        values = torch.cat([values, torch.stack(others)])
        self._values = HostCopy(values)

    def figures(self) -> dict[str, float]:
        *numbers, base, mix, places, tokens, grad_norm = self._values.tolist()
        if not base:
            warnings.warn("no token of a step was to be predicted: every label is -100, or the texts are empty", stacklevel=3)
        figures = dict(zip(self._names, numbers, strict=True))
        figures["weight"] /= max(1, mix)
        for name in ("reward", "advantage", "leak_rate", "dead_groups"):
            figures[name] /= max(1, places)
        if "thought_length" in figures:
            figures["thought_length"] /= max(1, figures["thoughts"])
        if "divergence" in figures:
            figures["divergence"] /= max(1, tokens)
        if "anchors" in figures:
            figures["anchor_share"] = figures["anchors"] / figures["tokens"]
        return figures | {"grad_norm": grad_norm}
