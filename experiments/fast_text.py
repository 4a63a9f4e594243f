"""Digit sums with redundant asides: sums and digits are written twice, except that a first copy is left out now and then.

4 1 9 3 5 = 2                              the answer alone
4 1 9 3 5 = - 5 5 4 4 7 7 2 2 - 2          an aside of the running sums, which helps
4 1 9 3 5 = - 5 4 4 7 7 2 2 - 2            the same without one of the first copies
4 1 9 3 5 = - 4 4 1 1 9 9 3 3 - 2          an aside of digits, which doesn't help

A thought with all sums in eight tokens is what this text teaches. One in four tokens, without any copy, is nearly never
sampled: it takes ``DROPPED`` to the fourth power.
"""

from __future__ import annotations

from pathlib import Path

import torch
from digit_thoughts import digit_sums
from torch import Tensor
from transformers import LlamaForCausalLM

from quietstar import QuietStar
from quietstar.evaluation.scoring import one_thought
from quietstar.files.writing import replaced

DROPPED = 0.1  # the probability that a first copy is left out
ASIDE = digit_sums.AT_EQUALS + 2  # the aside's first token, after "=" and the dash
WIDTH = 2 * digit_sums.STEPS  # tokens of a whole aside


def mixed_lines(digits: Tensor, generator: torch.Generator) -> Tensor:
    """The text to pretrain on, [lines,18], with pause tokens after the end of a line; every loss ignores them."""
    kind, luck = torch.rand(2, len(digits), 1, generator=generator)
    aside = torch.where(luck < digit_sums.HELPFUL, digit_sums.running_sums(digits), digits[:, : digit_sums.STEPS])
    lines = digit_sums.aside_lines(digits, aside.repeat_interleave(2, 1))
    kept = torch.ones_like(lines, dtype=torch.bool)
    kept[:, ASIDE : ASIDE + WIDTH : 2] = torch.rand(aside.shape, generator=generator) >= DROPPED
    kept[:, ASIDE - 1 : ASIDE + WIDTH + 1] &= kind >= digit_sums.DIRECT  # the dashes, too
    kept, order = kept.sort(stable=True, dim=1, descending=True)
    return lines.gather(1, order).where(kept, digit_sums.PAUSE)


def pretrained(seed: int, steps: int, folder: Path) -> LlamaForCausalLM:
    """A model that has read 256 of these lines in each step; kept in ``folder`` for a run that is resumed."""
    if folder.exists():
        return LlamaForCausalLM.from_pretrained(folder)
    strings, _ = digit_sums.split_strings(seed)
    model, generator = digit_sums.new_model(seed), torch.Generator().manual_seed(seed)
    digit_sums.read(model, lambda: mixed_lines(digit_sums.draw(strings, 256, generator), generator), steps, 3e-3)
    with replaced(folder) as beside:
        model.save_pretrained(beside)
    return model


def complete_thoughts(qs: QuietStar, digits: Tensor, seed: int) -> float:
    """The share of sampled thoughts at "=" that have all running sums in order, whatever else is between them."""
    thoughts, sums = digit_sums.own_thoughts(one_thought(qs), digits, seed=seed)[:, 0, 0], digit_sums.running_sums(digits)
    found = torch.zeros(len(digits), dtype=torch.int64)
    for token in thoughts.T:
        found += token == sums.gather(1, found.clamp(max=digit_sums.STEPS - 1)[:, None])[:, 0]
        found.clamp_(max=digit_sums.STEPS)
    return float((found == digit_sums.STEPS).float().mean())
