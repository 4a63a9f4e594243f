"""Quiet-STaR where thinking must help: the last digit of a sum, which a small model cannot tell in one step but can in five.

A line is five digits and the last digit of their sum: 7 5 8 6 2 = 8. A small Llama first reads lines of two kinds, most of
them with an aside before the answer:

    7 5 8 6 2 = 8                  the answer alone, 40 % of the lines
    7 5 8 6 2 = - 2 0 6 8 - 8      an aside of running sums, which helps: 24 %
    7 5 8 6 2 = - 7 5 8 6 - 8      an aside that repeats the digits, which doesn't: 36 %

Then Quiet-STaR trains it on lines without any aside. Its thoughts may be asides of either kind or anything else, and the only
reward is a better prediction of the next token. Every control starts from the same model: no thoughts, pause tokens or random
digits as thoughts, another line's thoughts, thoughts without REINFORCE, a language model that stays as it was.

    python examples/digit_sums.py --quick --threads 2   one seed, every position thinks, some controls: about two minutes
    python examples/digit_sums.py --seeds 5             every run and control of docs/digit-sums.md: twelve minutes a seed
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the model is too small for a GPU to help
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave a busy core to others

import digit_sums_report as report
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import TrainConfig
from quietstar.objective import Counts
from quietstar.run.batches import Batch, Example
from quietstar.run.signals import Interrupted
from quietstar.train import Loss, thought_loss, train

# A token is a character: the digits 0 to 9, then these.
EQUALS, DASH, NEWLINE, PAUSE = 10, 11, 12, 13
SYMBOLS = "0123456789=-\n_"
DIGITS, STEPS = 5, 4  # of a line, of an aside
AT_EQUALS = DIGITS  # the position of "=", whose next token is the answer in a line without an aside

HELPFUL = 0.4  # share of the asides that are running sums
DIRECT = 0.4  # share of the lines without an aside
TEST_LINES, QUICK_LINES, CURVE_LINES = 2048, 1024, 256
RIGHT_STEPS, RIGHT_THOUGHTS = 0.85, 0.25  # what pretraining must have taught, for thoughts to be worth training


# The text


def split_strings(seed: int) -> tuple[Tensor, Tensor]:
    """All strings of five digits in random order, [90000,5] to train on and [10000,5] held out.

    A rule such as "the string mod 10" would not do: it says something about the sum of the digits.
    """
    numbers = torch.randperm(10**DIGITS, generator=torch.Generator().manual_seed(seed))
    strings = numbers[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1) % 10
    held_out = len(strings) // 10
    return strings[held_out:], strings[:held_out]


def running_sums(digits: Tensor) -> Tensor:
    """[lines,4], the last digits of the sums of the first 2, 3, 4 and 5 digits; the last of them is the answer."""
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
    """The text to pretrain on, [lines,14], with this share of its asides helpful. Lines without an aside are filled up with
    pause tokens, which no loss looks at."""
    kind, luck = torch.rand(2, len(digits), 1, generator=generator)
    aside = torch.where(luck < helpful, running_sums(digits), digits[:, :STEPS])
    with_aside, direct = aside_lines(digits, aside), direct_lines(digits)
    fill = column(digits, PAUSE).expand(-1, with_aside.shape[1] - direct.shape[1])
    return torch.where(kind < DIRECT, torch.cat([direct, fill], 1), with_aside)


def draw(strings: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return strings[torch.randint(len(strings), (count,), generator=generator)]


def as_text(tokens: Tensor) -> str:
    return " ".join(SYMBOLS[token] for token in tokens.tolist())


# The language model


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    width = 64
    model = LlamaForCausalLM(
        LlamaConfig(
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
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # and with wide embeddings it learns them sooner
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
    """Plain next-token training."""
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = lm_loss(model, lines_of_step(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def read_mixed_lines(
    model: LlamaForCausalLM, strings: Tensor, steps: int, peak: float, seed: int, helpful: float = HELPFUL
) -> None:
    """Pretraining: the learning rate falls from ``peak`` to 5 % of it along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    train_lm(
        model,
        lambda step: mixed_lines(draw(strings, 256, generator), generator, helpful),
        optimizer,
        lambda step: peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
        steps,
    )


def pretrain(
    strings: Tensor, held_out: Tensor, seed: int, steps: int, helpful: float = HELPFUL
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A model that has learnt to write running sums, with longer training where it hasn't, and what the gate measured.

    Without this gate a run that gains nothing would say nothing about Quiet-STaR.
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


@torch.no_grad()
def measure_gate(model: LlamaForCausalLM, held_out: Tensor, seed: int) -> dict[str, Any]:
    """How well the model continues running sums, and how often a thought sampled from it is all of them.

    The first step does not count: there the text goes on either way.
    """
    model.eval()
    digits = held_out[:TEST_LINES]
    sums = running_sums(digits)
    first = AT_EQUALS + 1  # the dash, which predicts the first step
    probability = model(aside_lines(digits, sums)).logits[:, first : first + STEPS].softmax(-1)
    steps = probability.gather(2, sums[..., None])[..., 0].mean(0).tolist()
    right = right_thoughts(own_thoughts(think_with(model, EQUALS_ONLY, QUIET_STAR, seed), digits, seed=seed), digits)
    return {"steps_right": steps, "right_thoughts": right, "passed": min(steps[1:]) >= RIGHT_STEPS and right >= RIGHT_THOUGHTS}


# Training with thoughts


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


# The policy term is a mean over all positions that think: where one in seven is worth a thought, its weight must be larger.
EQUALS_ONLY = Setting("at =", (AT_EQUALS,), thoughts=4, lookahead=1, lines=64, steps=300, policy_weight=3)
EVERYWHERE = Setting("everywhere", tuple(range(DIGITS + 2)), thoughts=2, lookahead=2, lines=32, steps=150, policy_weight=10)


@dataclass(frozen=True)
class Run:
    """Quiet-STaR, or it with something taken away.

    Attributes:
        thoughts: "own", or what stands in their place: "pause" tokens, "random" digits.
        reinforce: False sets the policy weight to 0.
        frozen: only the mixing head is trained.
        rehearsal: every step also trains on 64 lines of the text that the model was pretrained on.
        embedding_scale: the start and end vectors are stored divided by this, which multiplies their learning rate.
    """

    name: str
    thoughts: str = "own"
    reinforce: bool = True
    frozen: bool = False
    rehearsal: bool = False
    embedding_scale: float = 1.0


QUIET_STAR = Run("Quiet-STaR")
PLAIN = "plain language model, 4 times the batch"
FORCED = "untrained thoughts, w = 1"
SHUFFLED = "Quiet-STaR with another line's thoughts"
PAUSES = Run("pause tokens as thoughts", thoughts="pause", reinforce=False)
RANDOM = Run("random digits as thoughts", thoughts="random", reinforce=False)
FROZEN = Run("frozen model, mixing head trained", reinforce=False, frozen=True)
NO_REINFORCE = Run("no REINFORCE", reinforce=False)
REHEARSED = Run("Quiet-STaR with rehearsal", rehearsal=True)
NO_REINFORCE_REHEARSED = Run("no REINFORCE, with rehearsal", reinforce=False, rehearsal=True)
OFFICIAL_SCALE = Run("Quiet-STaR, start and end stored at 1/100", embedding_scale=100.0)

QUICK_RUNS = {replace(EVERYWHERE, steps=100): (QUIET_STAR, FROZEN)}
ALL_RUNS = {
    EQUALS_ONLY: (QUIET_STAR, FROZEN, NO_REINFORCE, NO_REINFORCE_REHEARSED, REHEARSED, PAUSES, RANDOM, OFFICIAL_SCALE),
    EVERYWHERE: (QUIET_STAR, FROZEN, NO_REINFORCE, NO_REINFORCE_REHEARSED, REHEARSED, PAUSES, RANDOM),
}


def think_with(model: LlamaForCausalLM, setting: Setting, run: Run, seed: int) -> QuietStar:
    """A copy of the model, wrapped for a run. Start and end begin as the dash that opens and closes an aside in the text."""
    config = ThoughtConfig(
        thoughts=setting.thoughts,
        thought_tokens=STEPS,
        lookahead=setting.lookahead,
        policy_weight=setting.policy_weight if run.reinforce else 0,
        embedding_scale=run.embedding_scale,
        embedding_init=DASH,
    )
    torch.manual_seed(seed)  # of the mixing head
    return QuietStar(copy.deepcopy(model), config).eval()


class DirectLines(Sequence[Example]):
    """Lines without an aside, as the training loop takes them, with ready-made thoughts where a control asks for them."""

    def __init__(self, digits: Tensor, setting: Setting, thoughts: str, generator: torch.Generator):
        lines = direct_lines(digits)
        # REINFORCE leaves out the last position that has all its targets, which would be "=" without a padded token.
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


def given_thoughts(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "pause":
        return torch.full(shape, PAUSE)
    return torch.randint(10, shape, generator=generator)


def with_rehearsal(strings: Tensor, text: Callable[[Tensor, torch.Generator], Tensor]) -> Loss:
    """The Quiet-STaR objective, and half the plain loss on 64 lines of the text that the model was pretrained on."""

    def loss(qs: Any, batch: Batch, counts: Counts, seed: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(seed)
        value, out = thought_loss(qs, batch, counts, seed)
        return value + 0.5 * lm_loss(qs.model, text(draw(strings, 64, generator), generator)), out

    return loss


def train_thoughts(
    model: LlamaForCausalLM, setting: Setting, run: Run, strings: Tensor, held_out: Tensor, seed: int, out: Path
) -> tuple[QuietStar, dict[str, Any]]:
    """Train a copy of ``model``; returns it with its seconds and learning curve."""
    qs = think_with(model, setting, run, seed)
    if run.frozen:
        qs.requires_grad_(False)
        qs.mixing_head.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    data = DirectLines(draw(strings, setting.lines * setting.steps, generator), setting, run.thoughts, generator)
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
    curve_lines = held_out[TEST_LINES : TEST_LINES + CURVE_LINES]
    began = time.perf_counter()
    lines = train(
        qs,
        data,
        config,
        loss=with_rehearsal(strings, mixed_lines) if run.rehearsal else thought_loss,
        evaluate=lambda qs: curve_point(qs, run, curve_lines, seed),
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - began
    names = ("step", "eval_exact_match", "eval_right_thoughts")
    curve = [{name.removeprefix("eval_"): line[name] for name in names} for line in lines if "eval_exact_match" in line]
    return qs.eval(), {"seconds": seconds, "curve": curve}


def train_plain(model: LlamaForCausalLM, setting: Setting, strings: Tensor, digits: Tensor, seed: int) -> dict[str, Any]:
    """The control without thoughts, with four times the lines a step; its seconds and its score on ``digits``."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    config = TrainConfig(learning_rate=1e-3, warmup=20, steps=setting.steps)
    began = time.perf_counter()
    train_lm(
        model,
        lambda step: direct_lines(draw(strings, 4 * setting.lines, generator)),
        optimizer,
        config.rate,
        setting.steps,
    )
    seconds = time.perf_counter() - began
    with torch.no_grad():
        logits = model.eval()(direct_lines(digits)).logits[:, AT_EQUALS, None]
    return {"sampled": score(logits, digits), "seconds": seconds}


# Evaluation: one thought for each position, and the answer is the most likely of all 14 tokens


@contextmanager
def one_thought(qs: QuietStar) -> Iterator[None]:
    trained_with = qs.thought_config
    qs.thought_config = replace(trained_with, thoughts=1, lookahead=1)
    try:
        yield
    finally:
        qs.thought_config = trained_with


def own_thoughts(qs: QuietStar, digits: Tensor, anchors: Sequence[int] = (AT_EQUALS,), seed: int | None = None) -> Tensor:
    """Ids [lines,P,1,4]: sampled with a seed, greedy without."""
    places = torch.tensor(anchors).expand(len(digits), -1)
    with one_thought(qs):
        return qs.think(direct_lines(digits), anchors=places, seed=seed, greedy=seed is None).thought_ids


def right_thoughts(thought_ids: Tensor, digits: Tensor) -> float:
    """The share of thoughts at "=" that are all four running sums."""
    return (thought_ids[:, 0, 0] == running_sums(digits)).all(1).float().mean().item()


@dataclass
class Prediction:
    """Logits [lines,P,14] of the token after each anchor: without a thought, mixed, from the thought alone; and w [lines,P]."""

    base: Tensor
    mixed: Tensor
    thought: Tensor
    weight: Tensor


@torch.no_grad()
def predict(qs: QuietStar, digits: Tensor, thought_ids: Tensor, anchors: Sequence[int] = (AT_EQUALS,)) -> Prediction:
    """Read at the mixing head, whose input is [text state; thought state] and whose output is w."""
    seen = []
    hook = qs.mixing_head.register_forward_hook(lambda head, inputs, weight: seen.append((inputs[0], weight)))
    places = torch.tensor(anchors).expand(len(digits), -1)
    with one_thought(qs):
        qs(direct_lines(digits), anchors=places, thought_ids=thought_ids)
    hook.remove()
    states, weight = (x[:, :, 0, 0] for x in seen[0])
    base, thought = states.chunk(2, -1)
    mixed = (1 - weight) * base + weight * thought
    return Prediction(*(qs.model.lm_head(x) for x in (base, mixed, thought)), weight[..., 0])


def score(logits: Tensor, digits: Tensor) -> dict[str, Any]:
    """logits [lines,P,14] of the answer, P = 1: mean loss in nats and the number of lines whose best token is the answer."""
    answers = running_sums(digits)[:, -1]
    nll = cross_entropy(logits[:, 0], answers).item()
    return {"nll": nll, "right": int((logits[:, 0].argmax(-1) == answers).sum()), "lines": len(digits)}


def curve_point(qs: QuietStar, run: Run, digits: Tensor, seed: int) -> dict[str, float]:
    """On lines of the learning curve: the share of exact matches and of right thoughts, greedy where they are the model's."""
    thoughts = thoughts_of(qs, run, digits, None)
    result = score(predict(qs, digits, thoughts).mixed, digits)
    return {"exact_match": result["right"] / result["lines"], "right_thoughts": right_thoughts(thoughts, digits)}


def thoughts_of(qs: QuietStar, run: Run, digits: Tensor, seed: int | None) -> Tensor:
    if run.thoughts == "own":
        return own_thoughts(qs, digits, seed=seed)
    return given_thoughts(run.thoughts, (len(digits), 1, 1, STEPS), torch.Generator().manual_seed(seed or 0))


def evaluate(qs: QuietStar, run: Run, digits: Tensor, seed: int, forced: bool = False) -> dict[str, Any]:
    """Scores with sampled and, where thoughts are the model's own, with greedy thoughts; ``forced`` sets w to 1."""
    thoughts = {"sampled": thoughts_of(qs, run, digits, seed)}
    if run.thoughts == "own":
        thoughts["greedy"] = thoughts_of(qs, run, digits, None)
    row: dict[str, Any] = {}
    for how, ids in thoughts.items():
        prediction = predict(qs, digits, ids)
        row[how] = score(prediction.thought if forced else prediction.mixed, digits)
    if run.thoughts == "own":
        row["right_thoughts"] = right_thoughts(thoughts["sampled"], digits)
        row["distinct_thoughts"] = len(thoughts["greedy"].flatten(1).unique(dim=0))
    return row


def measure_positions(qs: QuietStar, digits: Tensor, seed: int) -> dict[str, list[float]]:
    """Mean mixing weight and mean gain in nats at each position of a line, with sampled thoughts."""
    weights, gains = [], []
    for some in digits.split(512):
        prediction = predict(qs, some, own_thoughts(qs, some, EVERYWHERE.anchors, seed), EVERYWHERE.anchors)
        following = direct_lines(some)[:, 1:]
        losses = [cross_entropy(x.transpose(1, 2), following, reduction="none") for x in (prediction.base, prediction.mixed)]
        weights.append(prediction.weight)
        gains.append(losses[0] - losses[1])
    return {"w": torch.cat(weights).mean(0).tolist(), "gain": torch.cat(gains).mean(0).tolist()}


def some_thoughts(before: QuietStar, after: QuietStar, digits: Tensor, seed: int) -> list[dict[str, Any]]:
    """Sampled thoughts at "=" of a few lines, before and after training, as text."""
    both = [own_thoughts(qs, digits, seed=seed) for qs in (before, after)]
    prediction = predict(after, digits, both[1])
    base, mixed = (x[:, 0].softmax(-1) for x in (prediction.base, prediction.mixed))
    return [
        {
            "line": as_text(direct_lines(digits)[i, : AT_EQUALS + 1]),
            "before": as_text(both[0][i, 0, 0]),
            "after": as_text(both[1][i, 0, 0]),
            "right": as_text(running_sums(digits)[i]),
            "answer": as_text(answer),
            "p_without": base[i, answer].item(),
            "p_with": mixed[i, answer].item(),
            "w": prediction.weight[i, 0].item(),
        }
        for i, answer in enumerate(running_sums(digits)[:, -1:])
    ]


# All of it for one seed


def run_seed(
    seed: int, runs: dict[Setting, tuple[Run, ...]], out: Path, pretraining_steps: int = 600, test_lines: int = TEST_LINES
) -> dict[str, Any]:
    """Pretrain, pass the gate, train every run from the same model; returns everything measured, as plain numbers."""
    began = time.perf_counter()
    strings, held_out = split_strings(seed)
    digits = held_out[:test_lines]
    model, gate = pretrain(strings, held_out, seed, pretraining_steps)
    report.print_gate(seed, gate)
    result: dict[str, Any] = {"seed": seed, "pretraining": gate, "rows": [], "positions": None, "thoughts": {}}

    def add(setting: Setting, name: str, **row: Any) -> None:
        result["rows"].append({"setting": setting.name, "run": name, **row})
        report.print_row(seed, result["rows"][-1])

    for setting in runs if gate["passed"] else ():
        for run in runs[setting]:
            folder = out / f"seed-{seed}" / re.sub(r"\W+", "-", f"{setting.name} {run.name}")
            qs, training = train_thoughts(model, setting, run, strings, held_out, seed, folder)
            add(setting, run.name, **evaluate(qs, run, digits, seed), **training)
            if run is QUIET_STAR:
                shuffled = own_thoughts(qs, digits).roll(1, 0)
                add(setting, SHUFFLED, greedy=score(predict(qs, digits, shuffled).mixed, digits))
                before = think_with(model, setting, run, seed)
                add(setting, FORCED, **evaluate(before, run, digits, seed, forced=True))
                result["thoughts"][setting.name] = some_thoughts(before, qs, held_out[-8:], seed)
                if setting.name == EVERYWHERE.name:
                    result["positions"] = measure_positions(qs, digits, seed)
        add(setting, PLAIN, **train_plain(model, setting, strings, digits, seed))
    result["seconds"] = time.perf_counter() - began
    return {**result, "checks": check(result)}


def check(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of docs/digit-sums.md about one seed, each with what was measured and whether it holds."""
    gate = result["pretraining"]
    checks = [
        bound("pretraining", "probability of a right step after right ones", min(gate["steps_right"][1:]), least=RIGHT_STEPS),
        bound("pretraining", "right thoughts before training", gate["right_thoughts"], least=RIGHT_THOUGHTS),
    ]
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        checks += check_setting(setting, {row["run"]: row for row in result["rows"] if row["setting"] == setting})
    if result["positions"]:
        *before, at_equals, after = result["positions"]["w"]
        checks.append(bound(EVERYWHERE.name, 'mixing weight at "="', at_equals, least=0.3))
        checks.append(bound(EVERYWHERE.name, "largest mixing weight elsewhere", max(map(abs, [*before, after])), most=0.15))
    return checks


def check_setting(setting: str, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    trained = rows[QUIET_STAR.name]
    rivals = [exact_match(rows[run.name]) for run in (FROZEN, NO_REINFORCE_REHEARSED) if run.name in rows]
    greedy = 0.9 if setting == EQUALS_ONLY.name else 0.8
    checks = [
        bound(setting, "Quiet-STaR, greedy", exact_match(trained, "greedy"), least=greedy),
        bound(setting, SHUFFLED, exact_match(rows[SHUFFLED], "greedy"), most=0.15),
    ]
    if rivals:
        lead = exact_match(trained) - max(rivals)
        checks.append(bound(setting, "Quiet-STaR, above the best use of thoughts without REINFORCE", lead, least=0.35))
    if setting == EQUALS_ONLY.name:
        checks.append(bound(setting, "Quiet-STaR, sampled", exact_match(trained), least=0.85))
        checks.append(bound(setting, "Quiet-STaR, sampled: loss", trained["sampled"]["nll"], most=0.6))
    for name in (PAUSES.name, RANDOM.name, PLAIN):
        if name in rows:
            checks.append(bound(setting, name, exact_match(rows[name]), most=0.15))
            checks.append(bound(setting, f"{name}: loss", rows[name]["sampled"]["nll"], least=2.2))
    return checks


def exact_match(row: dict[str, Any], how: str = "sampled") -> float:
    return row[how]["right"] / row[how]["lines"]


def bound(setting: str, what: str, value: float, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    passed = value >= least if least is not None else value <= most
    wanted = f">= {least}" if least is not None else f"<= {most}"
    return {"setting": setting, "what": what, "value": value, "wanted": wanted, "passed": passed}


def earlier_seeds(path: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The seeds in the results of an interrupted run, none where there is no file.

    Raises:
        ValueError: the run was another one than ``now``, or was made elsewhere.
    """
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    for name in now:
        if name != "seeds" and saved.get(name) != now[name]:
            raise ValueError(f"{path} was made with {name}={saved.get(name)!r}, not {now[name]!r}: take another --out")
    return saved["seeds"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="repeat everything from seeds 0 to SEEDS-1; default 1")
    parser.add_argument("--quick", action="store_true", help="every position thinks, fewer steps and lines, some controls")
    parser.add_argument("--out", type=Path, default=Path("runs/digit_sums"), help="folder for results, plots and page")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that are in the results.json of --out")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default 1: more help pretraining alone")
    parser.add_argument("--docs", type=Path, help="also write digit-sums.md, its plots and numbers into this folder")
    parser.add_argument("--results", type=Path, help="train nothing, show the results.json of an earlier run")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a threshold is missed")
    options = parser.parse_args()
    if options.docs and options.quick:
        parser.error("--docs writes a page about all runs: leave out --quick")

    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.results:
        results = json.loads(options.results.read_text())
    else:
        results = {"quick": options.quick, **report.describe_machine()}
        if options.resume:
            try:
                results["seeds"] = earlier_seeds(options.out / "results.json", results)
            except ValueError as error:
                parser.error(str(error))
        done = {seed["seed"] for seed in results["seeds"]}
        runs, lines = (QUICK_RUNS, QUICK_LINES) if options.quick else (ALL_RUNS, TEST_LINES)
        for seed in range(options.seeds):
            if seed not in done:
                results["seeds"].append(run_seed(seed, runs, options.out, test_lines=lines))
                report.write_json(results, options.out / "results.json")
    report.show(results, options.out)
    if options.docs:
        report.write_docs(results, options.docs)
    failed = [check for seed in results["seeds"] for check in seed["checks"] if not check["passed"]]
    return 1 if failed and options.strict else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        print("\nStopped; seeds that were done are in results.json, and --resume goes on behind them.")
        sys.exit(130)
