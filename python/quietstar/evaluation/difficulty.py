"""Where thinking helps: the gain on tokens that are easy for the language model and on those that surprise it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from quietstar.arguments.values import instance
from quietstar.evaluation.intervals import Z
from quietstar.evaluation.losses import TokenLosses
from quietstar.files.pictures import legend_above, save

__all__ = ["by_difficulty"]

GROUPS = 10
Group = dict[str, Any]


def by_difficulty(losses: TokenLosses) -> dict[str, list[Group]]:
    """The gain of tenths of the tokens, from the easiest to the hardest.

    "base" sorts tokens by the base model's loss. This favours any other prediction on the hardest tokens, and the base model on
    the easiest, even when both are equally good, because those tokens were selected for the base model's bad or good luck.
    "mean" sorts by the mean of both losses, which favours neither.

    Returns:
        Under "base" and "mean", for each tenth: tokens, their number; easiest and hardest, the range of the sorted loss, nats;
        base, mixed and gain, means in nats; gain_low and gain_high, a 95 % interval of the gain that treats texts, not tokens,
        as independent (a ratio of sums over texts), or None if all tokens are from one text. With fewer than ten tokens, each
        is its own group.
    """
    instance("losses", losses, TokenLosses)
    return {"base": _tenths(losses, losses.base), "mean": _tenths(losses, (losses.base + losses.mixed) / 2)}


def _tenths(losses: TokenLosses, loss: Tensor) -> list[Group]:
    order = loss.argsort(stable=True)
    parts = order.tensor_split(min(GROUPS, len(order))) if len(order) else ()
    return [{"easiest": float(loss[part[0]]), "hardest": float(loss[part[-1]])} | gain_of(losses, part) for part in parts]


def gain_of(losses: TokenLosses, tokens: Tensor) -> Group:
    """The figures of ``by_difficulty`` for these tokens: tokens, base, mixed, gain, gain_low and gain_high."""
    base, mixed = losses.base[tokens], losses.mixed[tokens]
    mean = (base - mixed).mean()
    _, text_index = losses.text[tokens].unique(return_inverse=True)
    deviations = text_index.bincount(base - mixed - mean)  # summed over each text; they add up to 0
    low = high = None
    if len(deviations) > 1:
        margin = Z * float((deviations.square().sum() * len(deviations) / (len(deviations) - 1)).sqrt()) / len(tokens)
        low, high = float(mean) - margin, float(mean) + margin
    return {
        "tokens": len(tokens),
        "base": float(base.mean()),
        "mixed": float(mixed.mean()),
        "gain": float(mean),
        "gain_low": low,
        "gain_high": high,
    }


def text(tenths: dict[str, list[Group]]) -> str:
    """A line for each tenth."""
    lines = ["gain from thoughts in nats per token, for tenths of the tokens, with 95 % intervals"]
    lines.append(f"  {'by their loss without a thought':<48}by the mean of both losses")
    for pair in zip(tenths["base"], tenths["mean"], strict=True):
        cells = [f"{group['easiest']:7.3f} to {group['hardest']:6.3f}  {format_gain(group)}" for group in pair]
        lines.append(f"{cells[0]:<50}{cells[1]}")
    return "\n".join(lines)


def format_gain(group: Group) -> str:
    """The gain and, if there is one, its interval."""
    if group["gain_low"] is None:
        return f"{group['gain']:+.3f}"
    return f"{group['gain']:+.3f} ({group['gain_low']:+.3f} to {group['gain_high']:+.3f})"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(tenths: dict[str, list[Group]], path: str | os.PathLike) -> None:
    """Write a .png of ``by_difficulty``: a bar for each tenth by the base model's loss, a point for each by the mean."""
    from matplotlib.figure import Figure

    groups = tenths["base"]
    gains = [group["gain"] for group in groups]
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(groups)), gains, width=0.74, color="#9ec3dc", zorder=2, label="sorted by the loss without a thought")
    _whiskers(axes, groups, -0.14, "#3a6d8c")
    points = [group["gain"] for group in tenths["mean"]]
    places = [i + 0.14 for i in range(len(points))]
    axes.plot(places, points, "D", color="#c0563b", markersize=5, zorder=4, label="sorted by the mean of both losses")
    _whiskers(axes, tenths["mean"], 0.14, "#c0563b")
    axes.axhline(0, color="#222222", linewidth=0.8, zorder=2)
    axes.set_xticks(range(len(groups)), [f"{x['easiest']:.2g}\nto {x['hardest']:.2g}" for x in groups], fontsize=8)
    axes.set_xlabel("tenths of the tokens, easiest on the left, by loss without a thought (nats)")
    axes.set_ylabel("gain from thinking (nats per token)")
    figure.suptitle(f"Where thinking helps: {sum(group['tokens'] for group in groups):,} tokens, 95 % intervals over texts")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    legend_above(axes, 7.5)
    save(figure, path)


def _whiskers(axes: Any, groups: list[Group], shift: float, color: str) -> None:
    for i, group in enumerate(groups):
        if group["gain_low"] is not None:
            margin = group["gain"] - group["gain_low"]
            axes.errorbar(i + shift, group["gain"], margin, fmt="none", ecolor=color, capsize=3, zorder=3)
