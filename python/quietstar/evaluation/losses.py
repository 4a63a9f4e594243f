"""What thoughts are worth on held-out texts: the loss with and without greedy thoughts, and the gain with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quietstar import checks, objective
from quietstar.arguments.values import flag, instance, integer
from quietstar.evaluation.intervals import mean_interval
from quietstar.evaluation.scoring import one_thought
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.run.batches import Batch, Example, batches_of, check_data

__all__ = ["TokenLosses", "evaluate", "summary", "token_losses"]


@dataclass(frozen=True)
class TokenLosses:
    """The loss of each predicted token of some texts, one after another.

    Attributes:
        base, mixed: fp64 [tokens], -log p without a thought and with one greedy thought before the token, nats.
        text: int64 [tokens], the number of the text that it belongs to.
        place: int64 [tokens], the position before it, where the thought is.
    """

    base: Tensor
    mixed: Tensor
    text: Tensor
    place: Tensor


def evaluate(qs: QuietStar, examples: Sequence[Example], batch_size: int = 8, progress: bool = False) -> dict[str, float]:
    """Loss of the next token, with one greedy thought before it and without, over the examples' anchors (default: all).

    Args:
        examples: as ``train`` takes them; each counts as one text.

    Returns:
        base and mixed, nats: means over texts of a text's mean; gain = base - mixed, and gain_low to gain_high, its 95 %
        interval over texts, each compared with itself; texts and tokens, how many there were.

    Raises:
        ValueError: fewer than two texts with something to predict, which give no interval.
    """
    return summary(token_losses(qs, examples, batch_size, progress))


def summary(losses: TokenLosses) -> dict[str, float]:
    """What ``evaluate`` returns, from the losses of ``token_losses``."""
    tokens = instance("losses", losses, TokenLosses).text.bincount()
    tokens, counts = tokens[tokens > 0], tokens > 0
    if len(tokens) < 2:
        raise ValueError(f"evaluate: examples: an interval needs at least 2 texts with something to predict, got {len(tokens)}")
    base, mixed = (losses.text.bincount(x)[counts] / tokens for x in (losses.base, losses.mixed))
    gain, low, high = mean_interval((base - mixed).tolist())
    assert low is not None and high is not None
    return {
        "base": float(base.mean()),
        "mixed": float(mixed.mean()),
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "texts": len(tokens),
        "tokens": int(tokens.sum()),
    }


def token_losses(qs: QuietStar, examples: Sequence[Example], batch_size: int = 8, progress: bool = False) -> TokenLosses:
    """The losses that ``evaluate`` sums up; its arguments."""
    instance("evaluate: qs", qs, QuietStar)
    batch_size = integer("evaluate: batch_size", batch_size, 1)
    check_data("evaluate: examples", examples)
    flag("evaluate: progress", progress)
    parts = []
    with torch.no_grad(), dropout_off(qs):
        batches = batches_of(examples, batch_size, qs.start_embedding.device)
        total = -(-len(examples) // batch_size)
        for chosen, batch in tqdm(batches, desc="held-out texts", total=total, leave=False, disable=not progress):
            base, mixed, anchor, counts = _losses(one_thought(qs), batch)
            row, _ = counts.nonzero(as_tuple=True)
            parts.append(
                (base[counts].double().cpu(), mixed[counts].double().cpu(), chosen.start + row.cpu(), anchor[counts].cpu())
            )
    if not parts:
        return TokenLosses(*torch.zeros(2, 0).double(), *torch.zeros(2, 0).long())
    return TokenLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _losses(one: QuietStar, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the token after each anchor [B,P]: loss without a thought and with one, the anchor, and whether the token counts."""
    # With a seed, since drawing one would advance torch's generator and change the dropout of the run that is evaluated.
    out = one(**batch, seed=0)
    input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
    layout = one.thinker.layout(input_ids, attention_mask, batch.get("anchors"), batch.get("document_ids"))
    labels = checks.check_labels(batch.get("labels"), input_ids, one.lm_head.linear.out_features)
    counts = objective.make_targets(labels, attention_mask, layout, lookahead=1).mix[:, :, 0, 0] != objective.IGNORED
    anchor = layout.anchor.long()
    base = out.nll_base.gather(1, anchor.clamp(0, input_ids.shape[1] - 2))
    return base, out.nll_mix[:, :, 0, 0], anchor, counts
