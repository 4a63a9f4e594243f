"""The training loop of all recipes, and supervised fine-tuning on completions with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.config import AdapterConfig, option
from quietstar.hf.adapters import add, merge
from quietstar.run.batches import mix_seed
from quietstar.run.processes import Interrupted, Signals
from quietstar_kernels.checks import check, check_at_least, check_positive, check_types
from quietstar_recipes.common.logprobs import cuda_devices, logprob
from quietstar_recipes.common.saving import Progress
from quietstar_recipes.tasks import Row, Task

Example = tuple[list[int], list[int]]  # ids of a prompt and of its completion
Figures = dict[str, Any]


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the module's trainable parameters; fused, which is several times as fast for a small model on a CPU."""
    weights = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay, fused=True)


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    gradient: Callable[[int], Figures],
    *,
    name: str,
    clip: float = 1.0,
    rate: Callable[[int], float] | None = None,
    after: Callable[[Figures], Any] = lambda line: None,
    progress: Progress | None = None,
    save_every: int = 1,
) -> None:
    """Update ``module`` until ``steps`` updates are done, counted from the first one of the run.

    Args:
        gradient: from the number of finished updates to the figures of the next one, among them "loss"; it calls ``backward``.
        name: begins the message of an error, such as "score".
        rate: the learning rate by the number of finished updates; default the optimizer's.
        after: called with step, the figures, grad_norm and seconds of each update, to which it may add figures.
        progress: where figures and state are saved, after every ``save_every`` updates, after the last one and after a signal;
            default nowhere, and signals are left to the caller.

    Raises:
        FloatingPointError: a loss or gradient that is not finite; no step is taken.
        Interrupted: a signal was caught, and everything is saved.
    """
    with Signals() if progress else nullcontext() as signals:
        state = progress.state if progress else {"step": 0}
        while state["step"] < steps:
            # 1. The gradient, which must be finite.
            began, step = time.perf_counter(), state["step"]
            optimizer.zero_grad()
            figures = gradient(step)
            norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip))
            for what, value in (("loss", figures["loss"]), ("norm of the gradient", norm)):
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name}: the {what} is {value} at step {step + 1}")
            # 2. The step.
            if rate:
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
            optimizer.step()
            state["step"] += 1
            # 3. What the recipe does after it, and what is kept of it.
            line = {"step": step + 1, **figures, "grad_norm": norm, "seconds": time.perf_counter() - began}
            after(line)
            if progress:
                progress.metrics.add(line)
                stopped = bool(signals and signals.caught)
                if stopped or state["step"] == steps or state["step"] % save_every == 0:
                    progress.save(module, optimizer)
                if stopped:
                    raise Interrupted(state["step"], progress.folder)
        if progress and signals and signals.caught:  # while the last update was saved
            raise Interrupted(state["step"], progress.folder)


MOST_TOKENS = 2**19  # a larger batch would be filled with the same examples, over and over


@dataclass
class SFTConfig(AdapterConfig):
    """Optimizer, batches and adapters, which are merged at the end; the recipe sets the number of steps."""

    learning_rate: float = option(3e-4, "peak learning rate of AdamW")
    warmup: int = option(20, "steps of linear warmup")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    batch_tokens: int = option(1600, "most tokens in a batch, padding included; a longer example is a batch of its own")

    def __post_init__(self) -> None:
        check_types("SFTConfig", self)
        AdapterConfig.__post_init__(self)
        check_positive("SFTConfig", self, ("learning_rate", "clip", "batch_tokens"))
        check("SFTConfig", self, "batch_tokens", self.batch_tokens <= MOST_TOKENS, f"at most {MOST_TOKENS:,}")
        check_at_least("SFTConfig", self, 0, ("warmup", "weight_decay"))

    def rate(self, step: int) -> float:
        """The learning rate of a step, which counts from 0."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))


def completion_loss(model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
    """Mean loss of the completions' tokens, nats."""
    values, mask = logprob(model, prompts, completions)
    return -values.sum() / mask.sum()


def rows_with_chains(task: Task, count: int, generator: torch.Generator, recipe: str) -> list[Row]:
    """Training problems for a supervised start on the data's own chains. Raises ValueError if none has a chain."""
    rows = task.sample_with_chain(count, generator)
    if not rows:
        raise ValueError(f"{recipe}: sft_steps needs problems with chains, but the data have none")
    return rows


def sft(
    model: PreTrainedModel,
    examples: Sequence[Example],
    steps: int,
    config: SFTConfig | None = None,
    seed: int = 0,
    log: Callable[[Figures], Any] = lambda line: None,
) -> PreTrainedModel:
    """Train ``model`` in place for ``steps`` updates, in epochs whose order depends on ``seed``.

    The loss is the mean over the completion tokens of a batch, in nats. With ``config.lora_rank``, adapters of that rank are
    trained and then merged, which takes less memory.

    Args:
        log: called with step, loss, grad_norm, learning_rate, tokens and seconds of every update.

    Raises:
        ValueError: no examples, or adapters without peft.
        FloatingPointError: a loss that is not finite.
    """
    if not examples:
        raise ValueError("sft: there is no example to train on")
    lengths = [len(prompt) + len(completion) for prompt, completion in examples]

    def loss_of(trained: PreTrainedModel, chosen: Sequence[int]) -> tuple[Tensor, int]:
        prompts, completions = ([examples[i][part] for i in chosen] for part in (0, 1))
        return completion_loss(trained, prompts, completions), sum(map(len, completions))

    return fine_tune(model, lengths, loss_of, steps, config or SFTConfig(), seed, log)


def fine_tune(
    model: PreTrainedModel,
    lengths: Sequence[int],
    loss_of: Callable[[PreTrainedModel, Sequence[int]], tuple[Tensor, int]],
    steps: int,
    config: SFTConfig,
    seed: int = 0,
    log: Callable[[Figures], Any] = lambda line: None,
) -> PreTrainedModel:
    """Train ``model`` in place on examples of these lengths, as ``sft`` does, with another loss.

    Args:
        loss_of: from the model, or its adapters, and the numbers of a batch's examples to the loss and the number of tokens.
    """
    training = model.training
    with torch.random.fork_rng(cuda_devices(model)):  # used by new adapters and by dropout
        torch.manual_seed(mix_seed(seed, -1))
        trained = add(model, config) if config.lora_rank else model
        batches = token_batches(lengths, config.batch_tokens, seed)

        def gradient(step: int) -> Figures:
            loss, tokens = loss_of(trained, next(batches))
            loss.backward()
            return {"loss": float(loss.detach()), "learning_rate": config.rate(step), "tokens": tokens}

        optimizer = adamw(trained.train(), config.learning_rate, config.weight_decay)
        train(trained, optimizer, steps, gradient, name="sft", clip=config.clip, rate=config.rate, after=log)
    return (merge(trained) if config.lora_rank else model).train(training)


def token_batches(lengths: Sequence[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Indices of examples, batch after batch, without end.

    The number of examples in a batch times the longest of them is at most ``tokens``, unless the batch is a single example.
    """
    batch: list[int] = []
    longest = epoch = 0
    while True:
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
        for i in torch.randperm(len(lengths), generator=generator).tolist():
            longest = max(longest, lengths[i])
            if batch and (len(batch) + 1) * longest > tokens:
                yield batch
                batch, longest = [], lengths[i]
            batch.append(i)
        epoch += 1
