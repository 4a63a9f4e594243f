"""Anchors in chunks: the differentiable pass in memory for L + C*N*S rows, C anchors at a time.

The text runs once. Its keys, values and last hidden states enter every chunk as leaves whose gradients add up, and one backward
goes through the text after the last chunk's. A chunk keeps nothing for the backward but its losses and is computed again there
(``torch.utils.checkpoint``), so ``loss.backward()`` is still one call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar.config import ThoughtConfig, check_anchor_chunk
from quietstar.hf.decoder import ChunkPass, LeafPass, decode_rows
from quietstar.hf.modules import embeddings, is_sharded, layer_checkpoints_off
from quietstar.memory.step import CHUNK_COPIES, head_calls, head_on_cpu, head_on_gpu, step_memory
from quietstar.thinking.forward import PackedInputs, Predictions, Thinker
from quietstar_kernels import ThoughtLayout


def predict_in_chunks(thinker: Thinker, inputs: PackedInputs, size: int) -> Predictions:
    """What ``Thinker.predict`` returns, ``size`` anchors at a time."""
    text_pass = LeafPass(inputs.layout)
    embeds = embeddings(thinker.model)(inputs.input_ids)
    text = decode_rows(thinker.model, embeds, inputs.layout.text_position_ids(), text_pass)
    text_pass.done = True
    if torch.is_grad_enabled() and not text_pass.with_gradients:
        raise ValueError("anchor_chunk needs gradient checkpointing with use_reentrant=False, got use_reentrant=True")
    nll_base = -thinker.lm_head.logprob(text[:, :-1], inputs.tables.targets.base)
    parts = [
        checkpoint(_predict_chunk, thinker, inputs.select(places), text, text_pass.rows, use_reentrant=False)
        for places in inputs.layout.chunks(size)
    ]
    predicted = Predictions(text, nll_base, *(torch.cat(column, 1) for column in zip(*parts, strict=True)))
    if is_sharded(thinker.model):
        # FSDP gathers a layer for its backward when the gradient of its output comes. The text's last layer may have only that
        # of its keys and values.
        predicted = predicted._replace(logprob=predicted.logprob + text[:, :0].sum())
    return predicted


def _predict_chunk(
    thinker: Thinker, inputs: PackedInputs, text: Tensor, text_rows: list[tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll_compared, nll_mix, weight and logprob of one chunk, given the text."""
    layout, tables, targets = inputs.layout, inputs.tables, inputs.tables.targets.mix
    rows = thinker.rows(*inputs[:4], tables.rows)
    with layer_checkpoints_off(thinker.model):
        positions = rows.layout.position_ids()[:, layout.L :]
        hidden = decode_rows(thinker.model, rows.embeds, positions, ChunkPass(rows.layout, text_rows))
    h_base, (ahead, before) = text[tables.text, tables.places], rows.split(hidden)
    mixture = thinker.mix(h_base[:, :, None], ahead)
    predicted = torch.cat([targets[:, :, 0].flatten(), targets.flatten()])
    compared, nll_mix = thinker.mixed_nll(mixture, h_base.detach(), predicted)
    return compared.detach(), nll_mix, mixture.weight, rows.logprob(before)


# Share of the free memory that "auto" plans with: temporary gradients, fragments and other programs take the rest.
SHARE = 0.7
# Positions of the text whose memory is estimated; a step's memory is linear in them, but for the LM head's.
SAMPLE = 64


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that are free for activations, those that a text position and an anchor take, and those of the LM head's calls.

    Measured once per config, before its first chunk: later steps find their own allocations in memory. So sizes depend
    only on shapes, also after evaluations, whose config is another.
    """

    config: ThoughtConfig
    free: int
    position: float
    anchor: float
    head: Callable[[list[int]], int]

    def chunk(self, B: int, L: int) -> int:
        """Anchors of each of B texts of L tokens that fit."""

        def too_many(P: int) -> bool:
            return B * (L * self.position + P * self.anchor) + self.head(head_calls(self.config, B, L, P, True)) > self.free

        return bisect_left(range(1, L + 1), True, key=too_many)

    @staticmethod
    def measure(thinker: Thinker, parameters: Iterable[Tensor]) -> MemoryBudget:
        """Free memory less the gradients and AdamW's moments that don't exist yet, with the estimates of ``memory.step``."""
        config, weight = thinker.config, thinker.lm_head.linear.weight
        kind, (V, D), dtype = weight.device.type, weight.shape, weight.dtype
        memory = step_memory(thinker.model.config, config, 1, SAMPLE, dtype)
        missing = sum(3 * p.nbytes for p in parameters if p.requires_grad and p.grad is None)
        kept = memory.text / SAMPLE
        if any(getattr(module, "gradient_checkpointing", False) for module in thinker.model.modules()):
            kept = memory.checkpointed / (SAMPLE * (1 + config.thoughts * config.rows))
        keys_values = memory.rollout / (SAMPLE * (1 + config.thoughts * config.thought_tokens))
        free = int(SHARE * free_memory(weight.device)) - missing
        if kind == "cuda":
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype  # as ``LMHead.operands``
            head = partial(head_on_gpu, V=V, D=D, dtype=dtype, gpu_bytes=memory.gpu_bytes)
        else:
            head = partial(head_on_cpu, V=V, D=D, dtype=dtype)
        return MemoryBudget(config, free, kept + CHUNK_COPIES * keys_values, (memory.thoughts + memory.mixing) / SAMPLE, head)


class AnchorChunk:
    """How many anchors of each text think at a time: a number, "auto" by free memory, or None for all."""

    def __init__(self, setting: int | str | None):
        check_anchor_chunk(setting)
        self.setting = setting
        self._budgets: list[MemoryBudget] = []

    def size(self, thinker: Thinker, layout: ThoughtLayout, parameters: Iterable[Tensor]) -> int:
        """From 1 to P. ``parameters`` are those that are trained."""
        if self.setting is None:
            return max(1, layout.P)
        if self.setting != "auto":
            return max(1, min(int(self.setting), layout.P))
        budget = next((x for x in self._budgets if x.config == thinker.config), None)
        if budget is None:
            budget = MemoryBudget.measure(thinker, parameters)
            self._budgets.append(budget)
        return max(1, min(budget.chunk(layout.B, layout.L), layout.P))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil  # a GPU does without

    return psutil.virtual_memory().available
