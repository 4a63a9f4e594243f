"""The figures of a training step: sums over its parts, added up over parts and processes, then divided by the step's counts."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
from accelerate import Accelerator
from torch import Tensor

from quietstar.objective import Counts
from quietstar.output import QuietStarOutput
from quietstar.run.batches import Batch


def sums_of(loss: Tensor, out: QuietStarOutput, part: Batch) -> dict[str, Tensor]:
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
        "tokens": part["attention_mask"].sum(),
        "thoughts": torch.full_like(loss.detach(), out.reward.numel(), dtype=torch.float64),
    }
    if out.base_logprob is not None:
        sums["divergence"] = (out.logprob - out.base_logprob).sum()
    if out.anchors is not None:
        sums["anchors"] = (out.anchors >= 0).sum()
        sums["thoughts"] = sums["anchors"] * out.reward.shape[2]
    return sums


def add_up(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of several parts of a process, fp64."""
    return {name: reduce(add, (part[name].double() for part in parts)) for name in parts[0]}


def total_counts(accelerator: Accelerator, parts: list[Counts]) -> Counts:
    """The counts of the whole step, over parts and processes."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return Counts(*(accelerator.reduce(x) for x in (total.base, total.mix, total.places, total.tokens)))


def read(accelerator: Accelerator, sums: dict[str, Tensor], counts: Counts, norm: Tensor) -> dict[str, float]:
    """The figures of the step from the sums of each process, copied from the device at once.

    Args:
        counts: of the whole step.
        norm: gradient norm, 0-d.
    """
    names = sorted(sums)
    values = accelerator.reduce(torch.stack([sums[name] for name in names]))
    others = [x.to(values) for x in (counts.mix[0], counts.places, counts.tokens, norm)]
    *numbers, mix, places, tokens, grad_norm = torch.cat([values, torch.stack(others)]).tolist()
    figures = dict(zip(names, numbers, strict=True))
    figures["weight"] /= max(1, mix)
    for name in ("reward", "advantage"):
        figures[name] /= max(1, places)
    if "divergence" in figures:
        figures["divergence"] /= max(1, tokens)
    if "anchors" in figures:
        figures["anchor_share"] = figures["anchors"] / figures["tokens"]
    return figures | {"grad_norm": grad_norm}
