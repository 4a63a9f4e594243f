"""Quiet-STaR in one file, to be read from top to bottom: a text, a model, thoughts, training and prediction.

A line is five digits and the last digit of their sum: 7 5 8 6 2 = 8. That is too much for a small model to compute in one step,
but not in five. So a small Llama first reads lines of three kinds:

    7 5 8 6 2 = 8                  the answer alone, 40 % of the lines
    7 5 8 6 2 = - 2 0 6 8 - 8      an aside of running sums, which helps: 24 %
    7 5 8 6 2 = - 7 5 8 6 - 8      an aside that repeats the digits, which doesn't: 36 %

Then Quiet-STaR trains it on lines without an aside, where it may think what it has seen written. digit_sums.py runs this with
its controls; experiments/ use the same task. A model and a text of yours take the place of parts 1 and 2.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the model is too small for a GPU to help
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads yield a busy core; read when torch is imported

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import LlamaConfig, LlamaForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import TrainConfig
from quietstar.evaluation.scoring import one_thought
from quietstar.objective import Counts
from quietstar.run.batches import Example
from quietstar.texts import Texts
from quietstar.training import Loss, thought_loss, train

# 1. The text. A token is a character, so tensors of digits are also tensors of tokens: 0 to 9, then these.

EQUALS, DASH, NEWLINE, PAUSE = 10, 11, 12, 13
SYMBOLS = "0123456789=-\n_"
DIGITS, STEPS = 5, 4  # in a line, in an aside
AT_EQUALS = DIGITS  # the position of "=", whose next token is the answer in a line without an aside
HELPFUL = 0.4  # share of the asides that are running sums
DIRECT = 0.4  # share of the lines without an aside
TEST_LINES = 2048  # of the held-out strings, to score runs on


def split_strings(seed: int) -> tuple[Tensor, Tensor]:
    """All strings of five digits in random order, [90000,5] to train on and [10000,5] held out.

    The split is random because a rule such as "the string mod 10" would say something about the sum of the digits.
    """
    numbers = torch.randperm(10**DIGITS, generator=torch.Generator().manual_seed(seed))
    strings = numbers[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1) % 10
    held_out = len(strings) // 10
    return strings[held_out:], strings[:held_out]


def draw(strings: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return strings[torch.randint(len(strings), (count,), generator=generator)]


def running_sums(digits: Tensor) -> Tensor:
    """[lines,4], the last digits of the sums of the first 2, 3, 4 and 5 digits. The last one is the answer."""
    return digits.cumsum(1)[:, 1:] % 10


def column(digits: Tensor, token: int) -> Tensor:
    return digits.new_full((len(digits), 1), token)


def direct_lines(digits: Tensor) -> Tensor:
    """d d d d d = a and a newline, [lines,8]."""
    return torch.cat([digits, column(digits, EQUALS), running_sums(digits)[:, -1:], column(digits, NEWLINE)], 1)


def aside_lines(digits: Tensor, aside: Tensor) -> Tensor:
    """d d d d d = - c c c c - a and a newline, [lines,14]."""
    direct, dash = direct_lines(digits), column(digits, DASH)
    return torch.cat([direct[:, : AT_EQUALS + 1], dash, aside, dash, direct[:, AT_EQUALS + 1 :]], 1)


def mixed_lines(digits: Tensor, generator: torch.Generator, helpful: float = HELPFUL) -> Tensor:
    """The text to pretrain on, [lines,14], with this share of its asides helpful.

    Lines without an aside are padded with pause tokens, which every loss ignores.
    """
    kind, luck = torch.rand(2, len(digits), 1, generator=generator)
    aside = torch.where(luck < helpful, running_sums(digits), digits[:, :STEPS])
    with_aside, direct = aside_lines(digits, aside), direct_lines(digits)
    fill = column(digits, PAUSE).expand(-1, with_aside.shape[1] - direct.shape[1])
    return torch.where(kind < DIRECT, torch.cat([direct, fill], 1), with_aside)


def as_text(tokens: Tensor) -> str:
    return " ".join(SYMBOLS[token] for token in tokens.tolist())


# 2. The language model: a Llama of three layers and width 64, and plain next-token training.


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    width = 64
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=width**-0.5,  # with the default of 0.02 a model this narrow doesn't learn the running sums
        pad_token_id=PAUSE,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # with large embeddings it learns them sooner
    return model


def lm_loss(model: LlamaForCausalLM, lines: Tensor) -> Tensor:
    return model(lines, labels=lines.masked_fill(lines == PAUSE, -100)).loss


def train_lm(
    model: LlamaForCausalLM,
    lines_of_step: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    steps: int,
) -> None:
    """Train in place; ``lines_of_step`` and ``rate`` give the lines and the learning rate of each step."""
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = lm_loss(model, lines_of_step(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def read(model: LlamaForCausalLM, lines: Callable[[], Tensor], steps: int, peak: float) -> None:
    """Plain training on what ``lines`` draws for each step; the rate falls from ``peak`` to 5 % of it along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rate = [peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))) for step in range(steps)]
    train_lm(model, lambda step: lines(), optimizer, rate.__getitem__, steps)


# 3. Thoughts: which positions think, a model that can, and what it thinks.


@dataclass(frozen=True)
class Setting:
    """Which positions think, and the numbers that go with it."""

    name: str
    anchors: tuple[int, ...]
    thoughts: int
    lookahead: int
    lines: int
    steps: int
    policy_weight: float


# The policy loss is a mean over all positions that think. Where only one of seven needs a thought, its weight must be larger.
EQUALS_ONLY = Setting("at =", (AT_EQUALS,), thoughts=4, lookahead=1, lines=64, steps=300, policy_weight=3)
EVERYWHERE = Setting("everywhere", tuple(range(DIGITS + 2)), thoughts=2, lookahead=2, lines=32, steps=150, policy_weight=10)


def think_with(model: LlamaForCausalLM, setting: Setting, seed: int, **fields: Any) -> QuietStar:
    """A copy of the model that can think; ``fields`` are those of ThoughtConfig, beside the setting's.

    Its start and end vectors begin as the dash around an aside in the text.
    """
    own = {name: getattr(setting, name) for name in ("thoughts", "lookahead", "policy_weight")}
    own |= {"thought_tokens": STEPS, "embedding_scale": 1.0, "embedding_init": DASH}
    torch.manual_seed(seed)  # for the mixing head
    return QuietStar(copy.deepcopy(model), ThoughtConfig(**(own | fields))).eval()


def own_thoughts(qs: QuietStar, digits: Tensor, anchors: Sequence[int] = (AT_EQUALS,), seed: int | None = None) -> Tensor:
    """One thought per position, ids [lines,P,1,4]: sampled with a seed, greedy without."""
    places = torch.tensor(anchors).expand(len(digits), -1)
    return one_thought(qs).think(direct_lines(digits), anchors=places, seed=seed, greedy=seed is None).thought_ids


def right_thoughts(thought_ids: Tensor, digits: Tensor) -> float:
    """The share of thoughts at "=" [lines,1,1,4] that are all four running sums."""
    return (thought_ids[:, 0, 0] == running_sums(digits)).all(1).float().mean().item()


# 4. The model that thoughts are trained from, and the gate that it must pass.

RIGHT_STEPS, RIGHT_THOUGHTS = 0.85, 0.25  # what pretraining must reach for thoughts to be worth training


def pretrain(
    strings: Tensor, held_out: Tensor, seed: int, steps: int, helpful: float = HELPFUL
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A model that has learnt to write running sums, trained for longer if it hasn't, and what the gate measured.

    Without this gate, a run that gains nothing would say nothing about Quiet-STaR.
    """

    def learn(steps: int, peak: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        read(model, lambda: mixed_lines(draw(strings, 256, generator), generator, helpful), steps, peak)

    began = time.perf_counter()
    model = new_model(seed)
    learn(steps, 3e-3, seed)
    gate = measure_gate(model, held_out, seed)
    total = steps
    while not gate["passed"] and total < 2 * steps:
        learn(steps // 2, 1e-3, seed + total)
        gate = measure_gate(model, held_out, seed)
        total += steps // 2
    return model, {**gate, "steps": total, "seconds": time.perf_counter() - began}


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
    right = right_thoughts(own_thoughts(think_with(model, EQUALS_ONLY, seed), digits, seed=seed), digits)
    return {"steps_right": steps, "right_thoughts": right, "passed": min(steps[1:]) >= RIGHT_STEPS and right >= RIGHT_THOUGHTS}


# 5. Training: lines without an aside, and the loop.


class DirectLines(Sequence[Example]):
    """Lines without an aside for the training loop, with the thoughts of a control that doesn't sample its own."""

    def __init__(self, digits: Tensor, setting: Setting, thought_ids: Tensor | None = None):
        lines = direct_lines(digits)
        # REINFORCE leaves out the last position that has all its targets. Without a padded token, that would be "=".
        fill = column(digits, PAUSE).expand(-1, setting.lookahead - 1)
        self.tensors = {
            "input_ids": torch.cat([lines, fill], 1),
            "attention_mask": torch.cat([torch.ones_like(lines), torch.zeros_like(fill)], 1),
            "anchors": torch.tensor(setting.anchors).expand(len(lines), -1),
        }
        if thought_ids is not None:
            self.tensors["thought_ids"] = thought_ids

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> Example:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def train_to_think(
    qs: QuietStar, lines: Sequence[Example], setting: Setting, out: Path, seed: int, **options: Any
) -> list[dict[str, float]]:
    """Train ``qs`` in place; returns the metrics of each step, ten of which include those of ``evaluate``, if that is given."""
    config = TrainConfig(
        out=str(out),
        steps=setting.steps,
        batch_size=setting.lines,
        learning_rate=1e-3,
        warmup=20,
        seed=seed,
        eval_every=max(1, setting.steps // 10),
        save_every=setting.steps,
        keep=1,
    )
    return train(qs, lines, config, progress=sys.stderr.isatty(), **options)


def train_plain(model: LlamaForCausalLM, setting: Setting, strings: Tensor, digits: Tensor, seed: int) -> dict[str, Any]:
    """The control without thoughts, a copy trained on four times the lines per step: its score on ``digits``, and seconds."""
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


def with_rehearsal(strings: Tensor, text: Callable[[Tensor, torch.Generator], Tensor]) -> Loss:
    """The Quiet-STaR objective plus half the plain loss on 64 lines of the pretraining text."""

    def loss(qs: Any, texts: Texts, counts: Counts, seed: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(seed)
        value, out = thought_loss(qs, texts, counts, seed)
        return value + 0.5 * lm_loss(qs.model, text(draw(strings, 64, generator), generator)), out

    return loss


# 6. Prediction: what a thought is worth.


@dataclass
class Prediction:
    """Log-probabilities [lines,P,14] of a token: without the thought, mixed, from the thought alone; and w [lines,P]."""

    base: Tensor
    mixed: Tensor
    thought: Tensor
    weight: Tensor


def predict(qs: QuietStar, digits: Tensor, thought_ids: Tensor, anchors: Sequence[int] = (AT_EQUALS,)) -> Prediction:
    """Predict the token after each anchor of the lines without an aside, from thoughts [lines,P,1,4]."""
    return predict_lines(qs, direct_lines(digits), thought_ids, anchors)


@torch.no_grad()
def predict_lines(qs: QuietStar, lines: Tensor, thought_ids: Tensor, anchors: Sequence[int], ahead: int = 1) -> Prediction:
    """Predict the token ``ahead`` positions after each anchor, given the tokens between."""
    thinker = qs.with_config(replace(one_thought(qs).thought_config, lookahead=ahead)).thinker
    layout = thinker.layout(lines, anchors=torch.tensor(anchors).expand(len(lines), -1))
    text, thought = thinker.states(layout, lines, thought_ids)
    h_base = thinker.base_states(layout, text)[:, :, -1]
    h_thought = thinker.end_states(thought, None)[:, :, 0, -1]
    return Prediction(
        base=thinker.logprobs(h_base),
        mixed=thinker.mixed_logprobs(h_base, h_thought),
        thought=thinker.logprobs(h_thought),
        weight=thinker.mix(h_base, h_thought).weight,
    )


def score(logprobs: Tensor, digits: Tensor) -> dict[str, Any]:
    """Mean loss (nats) and number of right answers, the most likely of all 14 tokens, from log-probabilities [lines,1,14].

    They are taken as they are: mixed log-probabilities don't add up to 1, in the loss of training either.
    """
    answers = running_sums(digits)[:, -1]
    nll = nll_loss(logprobs[:, 0], answers).item()
    return {"nll": nll, "right": int((logprobs[:, 0].argmax(-1) == answers).sum()), "lines": len(digits)}
