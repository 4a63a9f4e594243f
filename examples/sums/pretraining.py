"""The language model that all runs start from, and the gate it must pass."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from sums.language_model import new_model, train_lm
from sums.quiet_star import own_thoughts, think_with
from sums.runs import EQUALS_ONLY, QUIET_STAR
from sums.task import AT_EQUALS, HELPFUL, STEPS, TEST_LINES, aside_lines, draw, mixed_lines, right_thoughts, running_sums

RIGHT_STEPS, RIGHT_THOUGHTS = 0.85, 0.25  # what pretraining must reach for thoughts to be worth training


def pretrain(
    strings: Tensor, held_out: Tensor, seed: int, steps: int, helpful: float = HELPFUL
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A model that has learnt to write running sums, trained for longer if it hasn't, and what the gate measured.

    Without this gate, a run that gains nothing would say nothing about Quiet-STaR.
    """
    began = time.perf_counter()
    model = new_model(seed)
    read_mixed_lines(model, strings, steps, 3e-3, seed, helpful)
    gate = measure_gate(model, held_out, seed)
    total = steps
    while not gate["passed"] and total < 2 * steps:
        read_mixed_lines(model, strings, steps // 2, 1e-3, seed + total, helpful)
        gate = measure_gate(model, held_out, seed)
        total += steps // 2
    return model, {**gate, "steps": total, "seconds": time.perf_counter() - began}


def read_mixed_lines(model: LlamaForCausalLM, strings: Tensor, steps: int, peak: float, seed: int, helpful: float) -> None:
    """Train on the text with asides. The learning rate falls from ``peak`` to 5 % of it along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    train_lm(
        model,
        lambda step: mixed_lines(draw(strings, 256, generator), generator, helpful),
        optimizer,
        lambda step: peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
        steps,
    )


@torch.no_grad()
def measure_gate(model: LlamaForCausalLM, held_out: Tensor, seed: int) -> dict[str, Any]:
    """How well the model continues running sums, and how often a thought sampled from it has all of them right.

    The first step does not count, because there the text can continue with either kind of aside.
    """
    model.eval()
    digits = held_out[:TEST_LINES]
    sums = running_sums(digits)
    first = AT_EQUALS + 1  # the dash, which predicts the first step
    probability = model(aside_lines(digits, sums)).logits[:, first : first + STEPS].softmax(-1)
    steps = probability.gather(2, sums[..., None])[..., 0].mean(0).tolist()
    right = right_thoughts(own_thoughts(think_with(model, EQUALS_ONLY, QUIET_STAR, seed), digits, seed=seed), digits)
    return {"steps_right": steps, "right_thoughts": right, "passed": min(steps[1:]) >= RIGHT_STEPS and right >= RIGHT_THOUGHTS}
