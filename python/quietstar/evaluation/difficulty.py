"""Where thinking pays: gains by how much a token surprises the model, and by where it thinks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quietstar.evaluation.intervals import PARTS, format_gain, parts_of, student
from quietstar.evaluation.losses import TokenLosses
from quietstar.files.pictures import legend_above, new_figure, save
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.run.batches import Example, batches_of, check_data, text_of
from quietstar.thinking.anchors import CHOICES
from quietstar_kernels.checks import instance, integer

GROUPS = 10
COLUMNS = {"gain": "gain", "content": "of it content"}
Group = dict[str, Any]


def by_difficulty(losses: TokenLosses) -> dict[str, list[Group]]:
    """The gain of tenths of the tokens, from the easiest to the hardest.

    "base" sorts tokens by the base model's loss. This favours any other prediction on the hardest tokens, and the base model on
    the easiest, even when both are equally good, because those tokens were selected for the base model's bad or good luck.
    "mean" sorts by the mean of both losses, which favours neither. The gain of content compares two other predictions, so it is
    "base" that favours neither of these.

    Returns:
        Under "base" and "mean", for each tenth: tokens, their number; easiest and hardest, the range of the sorted loss, nats;
        base, mixed and gain, means in nats; gain_low and gain_high, a 95 % interval of the gain that treats texts, not tokens,
        as independent (a ratio of sums over texts), or None if all tokens are from one text. Where the losses have controls,
        also mixing and content, the parts of the gain, with theirs. With fewer than ten tokens, each is its own group.
    """
    instance("losses", losses, TokenLosses)
    return {"base": _tenths(losses, losses.base), "mean": _tenths(losses, (losses.base + losses.mixed) / 2)}


def _tenths(losses: TokenLosses, loss: Tensor) -> list[Group]:
    order = loss.argsort(stable=True)
    parts = order.tensor_split(min(GROUPS, len(order))) if len(order) else ()
    return [{"easiest": float(loss[part[0]]), "hardest": float(loss[part[-1]])} | gain_of(losses, part) for part in parts]


def gain_of(losses: TokenLosses, tokens: Tensor) -> Group:
    """The figures of ``by_difficulty`` for these tokens: tokens, base, mixed, gain, gain_low, gain_high, mixing, ..."""
    base, mixed = losses.base[tokens], losses.mixed[tokens]
    _, text_index = losses.text[tokens].unique(return_inverse=True)
    group: Group = {"tokens": len(tokens), "base": float(base.mean()), "mixed": float(mixed.mean())}
    for name, values in parts_of(base, mixed, None if losses.another is None else losses.another[tokens]).items():
        mean, margin = float(values.mean()), _margin(values - values.mean(), text_index)
        low, high = (None, None) if margin is None else (mean - margin, mean + margin)
        group |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return group


def _margin(deviations: Tensor, text_index: Tensor) -> float | None:
    """Half the width of the interval of a mean, from each token's deviation from it; None where all are of one text."""
    sums = text_index.bincount(deviations)  # over each text; they add up to 0
    if len(sums) == 1:
        return None
    error = float((sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt()) / len(deviations)
    return student(len(sums) - 1) * error


def difficulty_text(tenths: dict[str, list[Group]]) -> str:
    """A line for each tenth, sorted in each way."""
    lines = ["gain from thoughts, nats per token, by tenths of the tokens, 95 % intervals"]
    for way, words in {"base": "by the base model's loss", "mean": "by mean of both losses"}.items():
        groups = tenths[way]
        parts = [part for part in ("gain", "content") if way == "base" and groups and part in groups[0]] or ["gain"]
        lines.append(f"  {words:<26}" + "".join(f"{COLUMNS[part]:<27}" for part in parts).rstrip())
        for group in groups:
            cells = "".join(f"{format_gain(group, part):<26} " for part in parts)
            lines.append(f"  {group['easiest']:9.3f} to {group['hardest']:7.3f}      {cells}".rstrip())
    return "\n".join(lines)


def draw(tenths: dict[str, list[Group]], path: str | os.PathLike) -> None:
    """Write a .png of ``by_difficulty``: a bar for each tenth by the base model's loss, on it the content where that is known,
    and a point for each by the mean."""
    groups = tenths["base"]
    gains = [group["gain"] for group in groups]
    figure = new_figure(8.5, 4.6)
    axes = figure.subplots()
    axes.bar(range(len(groups)), gains, width=0.74, color="#9ec3dc", zorder=2, label="sorted by the loss without a thought")
    _whiskers(axes, groups, "gain", -0.2, "#3a6d8c")
    if any("content" in group for group in groups):
        _points(axes, groups, "content", 0, "#2d7d46", "o", "of it content, own thoughts over another text's")
    _points(axes, tenths["mean"], "gain", 0.2, "#c0563b", "D", "sorted by the mean of both losses")
    axes.axhline(0, color="#222222", linewidth=0.8, zorder=2)
    axes.set_xticks(range(len(groups)), [f"{x['easiest']:.2g}\nto {x['hardest']:.2g}" for x in groups], fontsize=8)
    axes.set_xlabel("tenths of the tokens, easiest on the left, by loss without a thought (nats)")
    axes.set_ylabel("gain from thinking (nats per token)")
    figure.suptitle(f"Where thinking pays: {sum(group['tokens'] for group in groups):,} tokens, 95 % intervals over texts")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    legend_above(axes, 7.5)
    save(figure, path)


def _points(axes: Any, groups: list[Group], part: str, shift: float, color: str, marker: str, label: str) -> None:
    places = [i + shift for i in range(len(groups))]
    axes.plot(places, [group[part] for group in groups], marker, color=color, markersize=5, zorder=4, label=label)
    _whiskers(axes, groups, part, shift, color)


def _whiskers(axes: Any, groups: list[Group], part: str, shift: float, color: str) -> None:
    for i, group in enumerate(groups):
        if group[f"{part}_low"] is not None:
            margin = group[part] - group[f"{part}_low"]
            axes.errorbar(i + shift, group[part], margin, fmt="none", ecolor=color, capsize=3, zorder=3)


def by_anchor_choice(
    qs: QuietStar, examples: Sequence[Example], losses: TokenLosses, batch_size: int = 8
) -> list[dict[str, Any]]:
    """What thinking gains at the tokens of ``losses`` that each choice of ``anchors`` picks.

    Shares and strides are those of the model's config. A model with a gate has a row for it, open above 0.5, and one with
    a tokenizer for the ends of sentences. Random choices use seed 0.

    Args:
        examples: those that ``token_losses`` was given.

    Returns:
        For each choice: anchors, its name; tokens, how many have a thought before them, and their share of all; base, mixed,
        gain, its parts and their intervals for these as in ``by_difficulty``, None where there are none; gain_of_all, their
        gain over all tokens.
    """
    instance("qs", qs, QuietStar)
    instance("losses", losses, TokenLosses)
    batch_size = integer("batch_size", batch_size, 1)
    check_data("examples", examples)
    rows, parts = [], PARTS if losses.another is not None else PARTS[:1]
    for choice in CHOICES:
        if (choice == "gate" and qs.gate is None) or (choice == "sentences" and qs.tokenizer is None):
            continue
        chosen = _thinks(qs, choice, examples, losses, batch_size).nonzero()[:, 0]
        share = len(chosen) / max(1, len(losses.text))
        row: dict[str, Any] = {
            "anchors": choice,
            "share": share,
            "tokens": 0,
            **dict.fromkeys(("base", "mixed", *(f"{part}{end}" for part in parts for end in ("", "_low", "_high")))),
        }
        row |= gain_of(losses, chosen) if len(chosen) else {}
        rows.append(row | {"gain_of_all": share * (row["gain"] or 0.0)})
    return rows


@torch.no_grad()
def _thinks(qs: QuietStar, choice: str, examples: Sequence[Example], losses: TokenLosses, batch_size: int) -> Tensor:
    """bool [tokens], whether there is a thought before a token."""
    one = qs.with_config(replace(qs.thought_config, anchors=choice))
    found = torch.zeros(len(losses.text), dtype=torch.bool)
    with dropout_off(one):
        for chosen, batch in batches_of(examples, batch_size, qs.start_embedding.device):
            places = one.choose_anchors(**text_of(batch), seed=0).cpu()
            L = batch["input_ids"].shape[1]
            table = torch.zeros(len(chosen), L + 1, dtype=torch.bool).scatter_(1, places.where(places >= 0, L), True)
            mine = (losses.text >= chosen.start) & (losses.text < chosen.stop)
            found[mine] = table[losses.text[mine] - chosen.start, losses.place[mine]]
    return found


def anchor_text(rows: list[dict[str, Any]]) -> str:
    """A line for each choice."""
    parts = ("gain", "content") if "content" in rows[0] else ("gain",)
    lines = ["gain from thoughts, nats per token, by where the model thinks, 95 % intervals"]
    header = f"  {'':<9}{'share':>6}{'of all':>9}  {'after a thought':<27}"
    lines.append(header + ("of it content" if parts[1:] else ""))
    for row in rows:
        line = f"  {row['anchors']:<9}{row['share']:>6.0%}{row['gain_of_all']:>+9.4f}  "
        cells = "".join(f"{format_gain(row, part):<26} " for part in parts) if row["tokens"] else ""
        lines.append(line + cells)
    return "\n".join(line.rstrip() for line in lines)
