"""What natural_text.py would cost: memory by the estimate of ``quietstar doctor``, GPU hours by counting operations.

Nothing here is measured. A multiplication and an addition are two operations. A backward pass counts twice a forward one
(Kaplan et al., arXiv 2001.08361, section 2.1), a recomputed forward pass once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from natural_text_settings import Experiment
from tyro.conf import arg

from quietstar import ThoughtConfig
from quietstar.checkpoints.pretrained import load_config
from quietstar.memory.processes import Processes, count_weights, gathered_dtype, process_memory
from quietstar.memory.step import human, step_memory

# The questions of GSM8K's test split and CommonsenseQA's validation split, and a guess of how long a prompt is.
QUESTIONS = {"gsm8k": 1319, "commonsense_qa": 1221}
PROMPT = 128  # tokens
CONTROLS = 4  # own thoughts, another text's, constant, random
EVALUATIONS = 5  # before the first step and after each quarter; with own thoughts and another text's


@dataclass(frozen=True)
class Machine:
    """What the estimate assumes of a GPU."""

    tflops: Annotated[float, arg(help="for --cost: peak of a GPU in bf16; the H100 SXM's by its data sheet")] = 989.0
    tflops_fp32: Annotated[float, arg(help="for --cost: the same in fp32, for evaluation")] = 67.0
    utilization: Annotated[float, arg(help="for --cost: share of the peak that large batches reach, an assumption")] = 0.25
    layer_ms: Annotated[float, arg(help="for --cost: time of a layer where it waits for launches, an assumption")] = 0.5

    def __post_init__(self) -> None:
        for name in ("tflops", "tflops_fp32", "utilization", "layer_ms"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Machine: {name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Work:
    """A forward pass, or several.

    Attributes:
        operations: floating-point operations.
        passes: passes through the decoder one after another, each for few rows.
    """

    operations: float
    passes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.passes + other.passes)

    def __rmul__(self, times: float) -> Work:
        return Work(times * self.operations, round(times * self.passes))


@dataclass(frozen=True)
class Model:
    """The sizes that operations depend on: weights of all layers, V x D, layers, the width of all heads, and D."""

    weights: int
    vocabulary: int
    layers: int
    attention: int
    width: int

    @classmethod
    def of(cls, config: Any) -> Model:
        text = config.get_text_config()
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        D = text.hidden_size
        return cls(count_weights(config).layers, text.vocab_size * D, text.num_hidden_layers, heads * head, D)

    def forward(self, rows: float, context: float, logits: float, mixed: float = 0) -> Work:
        """``rows`` that attend to ``context`` others each, of which so many go to the LM head and to the mixing head."""
        attention = 4 * self.layers * self.attention * context * rows
        return Work(2 * self.weights * rows + attention + 2 * self.vocabulary * logits + 6 * self.width**2 * mixed)

    def step(self, e: Experiment, thoughts: ThoughtConfig) -> Work:
        """An optimizer step: the rollout, then the forward and backward pass over text and thoughts."""
        L, N, T, J = e.length, thoughts.thoughts, thoughts.thought_tokens, thoughts.lookahead
        P = math.ceil(L / thoughts.anchor_stride) if thoughts.anchors == "every" else L
        context = L / 2 + thoughts.rows / 2
        rollout = self.forward(L + P * N * T, context, P * N * T)
        packed = self.forward(L + P * N * thoughts.rows, context, 0, P * N * J)
        head = self.forward(0, 0, L + P * N * (J + T))  # the LM head's operation recomputes its logits in the backward pass
        return e.batch_size * (rollout + (4 if e.checkpointing else 3) * packed + 4 * head)

    def losses(self, e: Experiment, T: int, ways: int) -> Work:
        """The losses of the held-out texts in some ways, with thoughts that are made once."""
        L, context = e.length, e.length / 2 + T / 2
        one = self.forward(L + L * T, context, L * T) + ways * self.forward(L + L * (T + 2), context, 2 * L, L)
        return e.held_out * one

    def answers(self, e: Experiment, task: str, T: int) -> Work:
        """Answers of full length to all questions of a task; T is 0 for a model that doesn't think."""
        questions, new = min(e.questions, QUESTIONS[task]), getattr(e, f"{task}_tokens")
        rows = T + 3 if T else 1  # for each new token: itself, and the start, the tokens and the end of a thought
        work = self.forward(PROMPT + new * rows, PROMPT + new / 2, new * rows, new if T else 0)
        return Work(questions * work.operations, math.ceil(questions / e.eval_batch) * new * rows)


def cost(e: Experiment, machine: Machine) -> str:
    """The memory of a step and a table of hours, as text."""
    config = load_config(e.model)
    return f"{memory(e, config)}\n\n{hours(e, config, machine)}"


def memory(e: Experiment, config: Any) -> str:
    """Of training with thoughts on each GPU, and of evaluation; the arms differ little."""
    thoughts = e.thought_config(next((arm for arm in e.arms if arm != "plain"), "plain"))
    texts = max(1, math.ceil(e.batch_size / (e.gpus * e.accumulation)))
    processes = Processes(e.gpus, "no", torch.float32, gathered_dtype(torch.float32, e.precision))
    weights = count_weights(config)
    step = process_memory(step_memory(config, thoughts, texts, e.length, processes.computed), weights, processes)
    one = ThoughtConfig(thoughts=1, thought_tokens=e.thought_tokens, lookahead=1)
    held_out = step_memory(config, one, e.eval_batch, e.length)
    checkpoint = 3 * weights.bytes(torch.float32)
    return "\n".join(
        [
            f"memory of training: {human(step.peak(e.checkpointing))} on each GPU, {texts} texts at a time",
            f"memory of evaluation: {human(held_out.weights + held_out.rollout)}, {e.eval_batch} texts at a time",
            f"disk: {human((len(e.arms) * e.seeds + 1) * checkpoint)} for checkpoints with their optimizer state",
        ]
    )


def works(e: Experiment, model: Model) -> Iterator[tuple[str, int, Work, str]]:
    """What is done, how often, the work of each time, and its precision."""
    T, arms = e.thought_tokens, {arm: e.thought_config(arm) for arm in e.arms}
    models = e.seeds * sum(arm != "plain" for arm in arms)
    others = 1 + e.seeds * len(arms) - models  # the base model and the plain ones
    for arm, thoughts in arms.items():
        yield f"training, {arm}", e.seeds, e.steps * model.step(e, thoughts), e.precision
    yield "held-out texts, during training", EVALUATIONS * e.seeds * len(arms), model.losses(e, T, 2), e.precision
    yield "held-out texts, without thoughts", others, model.losses(e, 1, 1), "no"
    yield "held-out texts, with all thoughts", models, model.losses(e, T, CONTROLS), "no"
    for task in QUESTIONS:
        without = model.answers(e, task, 0)
        yield f"{task}, without thoughts", others, without, "no"
        yield f"{task}, with and without", models, without + model.answers(e, task, T), "no"


def hours(e: Experiment, config: Any, machine: Machine) -> str:
    model, total = Model.of(config), 0.0
    wait = machine.layer_ms / 1000 * model.layers
    lines = [f"{'':<36}{'times':>6}{'PFLOP each':>12}{'in a row':>10}{'GPU hours':>11}"]
    for name, times, work, precision in works(e, model):
        speed = 1e12 * machine.utilization * (machine.tflops if precision == "bf16" else machine.tflops_fp32)
        spent = times * max(work.operations / speed, work.passes * wait) / 3600
        total += spent
        lines.append(f"{name:<36}{times:>6}{work.operations / 1e15:>12,.1f}{work.passes:>10,}{spent:>11.2f}")
    lines.append(f"{'together':<64}{total:>11.2f}")
    return "\n".join(
        [
            *lines,
            "",
            "An estimate, not a measurement. Hours are the larger of two: the operations at "
            f"{machine.utilization:.0%} of {machine.tflops:g} TFLOP/s in bf16",
            f"and {machine.tflops_fp32:g} in fp32, and the passes in a row, each of {model.layers} layers at "
            f"{machine.layer_ms:g} ms. Answers are taken to have",
            f"full length, and prompts {PROMPT} tokens. Reading data and saving come on top.",
        ]
    )
