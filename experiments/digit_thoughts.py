"""Quiet-STaR on the digit sums of examples/sums.py, with any fields of the objective and thoughts at "=" only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from quietstar import QuietStar
from quietstar.config import TrainConfig
from quietstar.run.batches import Example
from quietstar.training import Loss, thought_loss, train

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import sums as digit_sums  # noqa: E402, of examples

SETTING = digit_sums.EQUALS_ONLY
SIZES: dict[str, dict[str, int]] = {  # steps of pretraining and of training thoughts, lines to measure on
    "tiny": {"pretraining": 2, "steps": 2, "lines": 20},
    "quick": {"pretraining": 600, "steps": 100, "lines": 1024},
    "full": {"pretraining": 600, "steps": 100, "lines": 2048},
}


def pretrained(seed: int, size: str, helpful: float = digit_sums.HELPFUL) -> tuple[LlamaForCausalLM, float]:
    """A model pretrained on lines of whose asides this share is helpful, and how often it writes a right thought."""
    model, gate = digit_sums.pretrain(*digit_sums.split_strings(seed), seed, SIZES[size]["pretraining"], helpful)
    return model, gate["right_thoughts"]


def trained(
    model: LlamaForCausalLM,
    lines: Sequence[Example],
    seed: int,
    out: Path,
    loss: Loss = thought_loss,
    updates: int = 1,
    **fields: Any,
) -> QuietStar:
    """A copy of the model that has learnt to think on these lines, 64 per step; ``fields`` are those of ThoughtConfig."""
    qs = digit_sums.think_with(model, SETTING, seed, **fields)
    steps = len(lines) // SETTING.lines
    options = {"steps": steps, "batch_size": SETTING.lines, "learning_rate": 1e-3, "warmup": 20, "updates": updates}
    train(qs, lines, TrainConfig(out=str(out), seed=seed, save_every=steps, keep=1, **options), loss=loss, progress=False)
    # One thought is enough to measure with, and leaves no other to compare its reward with.
    qs.thought_config = replace(qs.thought_config, advantage="relu", reward="gain")
    return qs.eval()


def measure(model: LlamaForCausalLM, seed: int, size: str, out: Path, updates: int = 1, **fields: Any) -> dict[str, float]:
    """Train a copy with thoughts; on held-out lines with greedy thoughts: accuracy, loss in nats and the mixing weight."""
    numbers = SIZES[size]
    strings, held_out = digit_sums.split_strings(seed)
    generator = torch.Generator().manual_seed(seed)
    lines = digit_sums.DirectLines(digit_sums.draw(strings, SETTING.lines * numbers["steps"], generator), SETTING)
    qs = trained(model, lines, seed, out, updates=updates, **fields)
    digits = held_out[: numbers["lines"]]
    thoughts = digit_sums.own_thoughts(qs, digits)
    found = digit_sums.predict(qs, digits, thoughts)
    score = digit_sums.score(found.mixed, digits)
    return {"accuracy": score["right"] / score["lines"], "loss": score["nll"], "mixing_weight": float(found.weight.mean())}
