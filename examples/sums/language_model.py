"""A Llama of three layers and width 64, and plain next-token training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sums.task import PAUSE, SYMBOLS


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
