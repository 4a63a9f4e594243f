"""What thoughts are worth on held-out texts: loss without and with greedy thoughts, and the interval of the gain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quietstar.batches import Batch, Example, collate
from quietstar.model import QuietStar
from quietstar.parts import dropout_off


def evaluate(qs: QuietStar, examples: Sequence[Example], batch_size: int = 8, progress: bool = False) -> dict[str, float]:
    """Loss of the next token, with one greedy thought before it and without, over the examples' anchors (default: all).

    Args:
        examples: as ``train`` takes them; each counts as one text.

    Returns:
        base and mixed, nats: means over texts of a text's mean; gain = base - mixed, and gain_low to gain_high, its 95 %
        interval over texts, each compared with itself; texts and tokens, how many there were.

    Raises:
        ValueError: fewer than two texts with something to predict, so that there is no interval.
    """
    sums = []
    with torch.no_grad(), dropout_off(qs):
        for start in tqdm(range(0, len(examples), batch_size), desc="held-out texts", leave=False, disable=not progress):
            places = range(start, min(start + batch_size, len(examples)))
            (batch,) = collate([examples[i] for i in places], list(places), 1)
            sums.append(_sums(qs, {name: x.to(qs.start_embedding.device) for name, x in batch.items()}))
    base, mixed, tokens = torch.cat(sums).double().cpu().unbind(1) if sums else torch.zeros(3, 0)
    counts = tokens > 0
    base, mixed = (base / tokens)[counts], (mixed / tokens)[counts]
    if len(base) < 2:
        raise ValueError(f"evaluate: an interval needs at least 2 texts with something to predict, got {len(base)}")
    gain = base - mixed
    margin = 1.96 * float(gain.std()) / len(gain) ** 0.5
    mean = float(gain.mean())
    return {
        "base": float(base.mean()),
        "mixed": float(mixed.mean()),
        "gain": mean,
        "gain_low": mean - margin,
        "gain_high": mean + margin,
        "texts": len(gain),
        "tokens": int(tokens.sum()),
    }


def _sums(qs: QuietStar, batch: Batch) -> Tensor:
    """For each text [B,3]: summed base loss, summed mixed loss, and over how many tokens."""
    one = copy.copy(qs)  # shares every weight; greedy thoughts are all the same, so one is enough
    one.thought_config = replace(qs.thought_config, thoughts=1, lookahead=1, reward="gain", advantage="relu")
    # A seed, for drawing one would move torch's generator and so the dropout of the run that is being evaluated.
    out = one(**batch, seed=0)
    L = batch["input_ids"].shape[1]
    anchors = batch.get("anchors", torch.arange(L, device=out.nll_base.device).expand(len(out.nll_base), L)).long()
    # Both losses are 0 where the target does not count.
    thinks = (anchors >= 0) & (anchors < L - 1)
    base = torch.where(thinks, out.nll_base.gather(1, anchors.clamp(0, L - 2)), 0)
    names = [name for name in ("input_ids", "attention_mask", "labels", "anchors", "document_ids") if name in batch]
    tokens = [one.count_targets(**{name: batch[name][i : i + 1] for name in names}).mix[0] for i in range(len(base))]
    return torch.stack([base.sum(1), out.nll_mix.sum((1, 2, 3)), torch.stack(tokens).to(base.dtype)], 1)
