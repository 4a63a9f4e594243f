"""Training of each run: Quiet-STaR, its controls, and the plain language model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from quietstar import QuietStar
from quietstar.config import TrainConfig
from quietstar.objective import Counts
from quietstar.run.batches import Batch, Example
from quietstar.training import Loss, thought_loss
from sums.evaluation import curve_point, given_thoughts
from sums.language_model import lm_loss, train_lm
from sums.quiet_star import think_with, train_to_think
from sums.runs import Run, Setting
from sums.task import AT_EQUALS, PAUSE, STEPS, TEST_LINES, column, direct_lines, draw, mixed_lines, score

CURVE_LINES = 256  # held-out lines of the learning curve


class DirectLines(Sequence[Example]):
    """Lines without an aside for the training loop, with the thoughts of a control that doesn't sample its own."""

    def __init__(self, digits: Tensor, setting: Setting, thoughts: str, generator: torch.Generator):
        lines = direct_lines(digits)
        # REINFORCE leaves out the last position that has all its targets. Without a padded token, that would be "=".
        fill = column(digits, PAUSE).expand(-1, setting.lookahead - 1)
        self.tensors = {
            "input_ids": torch.cat([lines, fill], 1),
            "attention_mask": torch.cat([torch.ones_like(lines), torch.zeros_like(fill)], 1),
            "anchors": torch.tensor(setting.anchors).expand(len(lines), -1),
        }
        if thoughts != "own":
            shape = (len(lines), len(setting.anchors), setting.thoughts, STEPS)
            self.tensors["thought_ids"] = given_thoughts(thoughts, shape, generator)

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> Example:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def with_rehearsal(strings: Tensor, text: Callable[[Tensor, torch.Generator], Tensor]) -> Loss:
    """The Quiet-STaR objective plus half the plain loss on 64 lines of the pretraining text."""

    def loss(qs: Any, batch: Batch, counts: Counts, seed: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(seed)
        value, out = thought_loss(qs, batch, counts, seed)
        return value + 0.5 * lm_loss(qs.model, text(draw(strings, 64, generator), generator)), out

    return loss


def train_thoughts(
    model: LlamaForCausalLM, setting: Setting, run: Run, strings: Tensor, held_out: Tensor, seed: int, out: Path
) -> tuple[QuietStar, dict[str, Any]]:
    """A trained copy of ``model``, with its seconds and its learning curve."""
    qs = think_with(model, setting, run, seed)
    if run.frozen:
        qs.requires_grad_(False)
        qs.mixing_head.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    lines = DirectLines(draw(strings, setting.lines * setting.steps, generator), setting, run.thoughts, generator)
    loss = with_rehearsal(strings, mixed_lines) if run.rehearsal else thought_loss
    curve_digits = held_out[TEST_LINES : TEST_LINES + CURVE_LINES]
    began = time.perf_counter()
    metrics = train_to_think(qs, lines, setting, out, seed, loss, lambda qs: curve_point(qs, run, curve_digits, seed))
    seconds = time.perf_counter() - began
    names = ("step", "eval_exact_match", "eval_right_thoughts")
    curve = [{name.removeprefix("eval_"): line[name] for name in names} for line in metrics if "eval_exact_match" in line]
    return qs.eval(), {"seconds": seconds, "curve": curve}


def train_plain(model: LlamaForCausalLM, setting: Setting, strings: Tensor, digits: Tensor, seed: int) -> dict[str, Any]:
    """The control without thoughts, on four times as many lines per step: its seconds and its score on ``digits``."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    rate = TrainConfig(learning_rate=1e-3, warmup=20, steps=setting.steps).rate
    began = time.perf_counter()
    train_lm(model, lambda step: direct_lines(draw(strings, 4 * setting.lines, generator)), optimizer, rate, setting.steps)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        logprobs = model.eval()(direct_lines(digits)).logits[:, AT_EQUALS, None].log_softmax(-1)
    return {"sampled": score(logprobs, digits), "seconds": seconds}
