"""Where thinking pays: at how many positions each ``anchors`` policy thinks, and what the thoughts there gain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quietstar.anchors import POLICIES
from quietstar.evaluation.difficulty import format_gain, gain_of
from quietstar.evaluation.losses import TokenLosses
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.run.batches import Example, batches_of, text_of


def by_policy(qs: QuietStar, examples: Sequence[Example], losses: TokenLosses, batch_size: int = 8) -> list[dict[str, Any]]:
    """What each policy's choice among the tokens of ``losses`` gains, with the shares and strides of the model's config.

    The gate's row is there where the model has a gate, open above 0.5. What is drawn is drawn with seed 0.

    Args:
        examples: those that ``token_losses`` was given.

    Returns:
        Of each policy: policy; tokens, how many have a thought before them, and share of all; base, mixed, gain, gain_low and
        gain_high of these as in ``by_difficulty``, None where there are none; gain_of_all, their gain over all tokens.
    """
    rows = []
    for policy in POLICIES:
        if policy == "gate" and qs.gate is None:
            continue
        chosen = _thinks(qs, policy, examples, losses, batch_size).nonzero()[:, 0]
        share = len(chosen) / max(1, len(losses.text))
        row: dict[str, Any] = {
            "policy": policy,
            "share": share,
            "tokens": 0,
            **dict.fromkeys(("base", "mixed", "gain", "gain_low", "gain_high")),
        }
        row |= gain_of(losses, chosen) if len(chosen) else {}
        rows.append(row | {"gain_of_all": share * (row["gain"] or 0.0)})
    return rows


@torch.no_grad()
def _thinks(qs: QuietStar, policy: str, examples: Sequence[Example], losses: TokenLosses, batch_size: int) -> Tensor:
    """bool [tokens], whether the policy thinks before a token."""
    one = copy.copy(qs)  # shares every weight
    one.thought_config = replace(qs.thought_config, anchors=policy)
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
    """A line for each policy."""
    lines = ["gain from thoughts, nats a token, by where the model thinks, with 95 % intervals"]
    lines.append(f"  {'':<10}{'thoughts':>9}{'share':>8}{'of all tokens':>15}  of those behind a thought")
    for row in rows:
        gain = format_gain(row) if row["tokens"] else ""
        lines.append(
            f"  {row['policy']:<10}{row['tokens']:>9,}{row['share']:>8.0%}{row['gain_of_all']:>+15.4f}  {gain}".rstrip()
        )
    return "\n".join(lines)
