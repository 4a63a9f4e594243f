"""Supervised fine-tuning on completions: the loss is on what follows the prompt, and a batch is limited by its tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.arguments.fields import check_at_least, check_positive, check_types
from quietstar.config import AdapterConfig, option
from quietstar.hf.adapters import add, merge
from quietstar.recipes.common.logprobs import logprob
from quietstar.recipes.common.optimization import adamw
from quietstar.run.batches import mix_seed

__all__ = ["SFTConfig", "sft"]

Example = tuple[list[int], list[int]]  # ids of a prompt and of its completion


@dataclass
class SFTConfig(AdapterConfig):
    """Optimizer, batches and adapters, which are merged at the end; the recipe sets the number of steps.

    Raises:
        ValueError: a value outside its range, by name.
    """

    learning_rate: float = option(3e-4, "peak learning rate of AdamW")
    warmup: int = option(20, "steps of linear warmup")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    batch_tokens: int = option(1600, "most tokens in a batch, padding included; a longer example is a batch of its own")

    def __post_init__(self) -> None:
        check_types("SFTConfig", self)
        AdapterConfig.__post_init__(self)
        check_positive("SFTConfig", self, ("learning_rate", "clip", "batch_tokens"))
        check_at_least("SFTConfig", self, 0, ("warmup", "weight_decay"))

    def rate(self, step: int) -> float:
        """The learning rate of a step, which counts from 0."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))


def sft(
    model: PreTrainedModel,
    examples: Sequence[Example],
    steps: int,
    config: SFTConfig | None = None,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
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
    config = config or SFTConfig()
    if not examples:
        raise ValueError("sft: there is no example to train on")

    def loss_of(trained: PreTrainedModel, chosen: Sequence[int]) -> tuple[Tensor, int]:
        batch = [examples[i] for i in chosen]
        values, mask = logprob(trained, [prompt for prompt, _ in batch], [completion for _, completion in batch])
        return -values.sum() / mask.sum(), int(mask.sum())

    lengths = [len(prompt) + len(completion) for prompt, completion in examples]
    return fine_tune(model, lengths, loss_of, steps, config, seed, log)


def fine_tune(
    model: PreTrainedModel,
    lengths: Sequence[int],
    loss_of: Callable[[PreTrainedModel, Sequence[int]], tuple[Tensor, int]],
    steps: int,
    config: SFTConfig,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
) -> PreTrainedModel:
    """Train ``model`` in place on examples of these lengths, as ``sft`` does, by a loss of one's own.

    Args:
        loss_of: from the model, or its adapters, and the numbers of a batch's examples to the loss and the number of tokens.
        log: called after every update, with the figures that ``sft`` names.
    """
    training = model.training
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # used by new adapters and by dropout
        torch.manual_seed(mix_seed(seed, -1))
        trained = add(model, config) if config.lora_rank else model
        optimizer = adamw(trained, config.learning_rate, config.weight_decay)
        batches = token_batches(lengths, config.batch_tokens, seed)
        trained.train()
        for step in range(steps):
            began = time.perf_counter()
            loss, tokens = loss_of(trained, next(batches))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), config.clip)
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            optimizer.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"sft: the loss is {value} at step {step + 1}")
            figures = {"grad_norm": float(norm), "learning_rate": config.rate(step), "tokens": tokens}
            log({"step": step + 1, "loss": value, **figures, "seconds": time.perf_counter() - began})
    return (merge(trained) if config.lora_rank else model).train(training)


def token_batches(lengths: Sequence[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Indices of examples, batch after batch, without end.

    The number of examples in a batch times the longest of them is at most ``tokens``, unless the batch is a single example.
    """
    batch: list[int] = []
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
        for i in torch.randperm(len(lengths), generator=generator).tolist():
            if batch and (len(batch) + 1) * max(lengths[i], *(lengths[j] for j in batch)) > tokens:
                yield batch
                batch = []
            batch.append(i)
        epoch += 1
