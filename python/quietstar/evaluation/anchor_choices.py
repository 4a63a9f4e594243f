"""Where thinking pays: at how many positions each choice of ``anchors`` thinks, and what the thoughts there gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quietstar.anchors import CHOICES
from quietstar.arguments.values import instance, integer
from quietstar.evaluation.difficulty import gain_of
from quietstar.evaluation.gain import PARTS, format_gain
from quietstar.evaluation.losses import TokenLosses
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.run.batches import Example, batches_of, check_data, text_of

__all__ = ["by_anchor_choice"]


def by_anchor_choice(
    qs: QuietStar, examples: Sequence[Example], losses: TokenLosses, batch_size: int = 8
) -> list[dict[str, Any]]:
    """What thinking gains at the tokens of ``losses`` that each choice of ``anchors`` picks.

    Shares and strides are those of the model's config. A model with a gate has a row for it, open above 0.5. Random choices
    use seed 0.

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
        if choice == "gate" and qs.gate is None:
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


def text(rows: list[dict[str, Any]]) -> str:
    """A line for each choice."""
    parts = ("gain", "content") if "content" in rows[0] else ("gain",)
    lines = ["gain from thoughts, nats a token, by where the model thinks, with 95 % intervals"]
    header = f"  {'':<9}{'thoughts':>8}{'share':>7}{'of all':>9}  {'after a thought':<27}"
    lines.append(header + ("of it content" if parts[1:] else ""))
    for row in rows:
        line = f"  {row['anchors']:<9}{row['tokens']:>8,}{row['share']:>7.0%}{row['gain_of_all']:>+9.4f}  "
        cells = "".join(f"{format_gain(row, part):<27}" for part in parts) if row["tokens"] else ""
        lines.append(f"{line}{cells}".rstrip())
    return "\n".join(line.rstrip() for line in lines)
