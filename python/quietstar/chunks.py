"""Anchors in chunks: the differentiable pass in memory for L + C*N*S rows, C anchors at a time.

The text runs once. Its keys, values and last hidden states enter every chunk as leaves whose gradients add up, and one backward
goes through the text after the last chunk's. A chunk keeps nothing for the backward but its losses and is computed again there
(``torch.utils.checkpoint``), so ``loss.backward()`` stays one call, whatever stands around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar.config import ThoughtConfig
from quietstar.hf.cache import ChunkPass, LeafPass
from quietstar.hf.decoder import decode_rows
from quietstar.hf.modules import embeddings, layer_checkpoints_off
from quietstar.memory.step import CHUNK_COPIES, step_memory
from quietstar.objective import Targets
from quietstar.rollout import split
from quietstar_kernels import ThoughtLayout

if TYPE_CHECKING:
    from quietstar.model import QuietStar


class Given(NamedTuple):
    """What the predictions of anchors are made from; ``thought_lengths`` is None where all thoughts have T tokens."""

    layout: ThoughtLayout
    input_ids: Tensor
    thought_ids: Tensor
    thought_lengths: Tensor | None
    targets: Targets

    def select(self, places: slice) -> Given:
        """That of some of the anchors."""
        return Given(
            self.layout.select(places),
            self.input_ids,
            self.thought_ids[:, places],
            None if self.thought_lengths is None else self.thought_lengths[:, places],
            self.targets.select(places),
        )


class Seen(NamedTuple):
    """What a pass says about every anchor.

    Attributes:
        nll_base: [B,P,J], of the base model at the targets of ``nll_mix``, from the same call.
        nll_mix: [B,P,N,J].
        weight: [B,P,N,J].
        logprob: [B,P,N,T], of the sampled tokens.
    """

    nll_base: Tensor
    nll_mix: Tensor
    weight: Tensor
    logprob: Tensor


def see_in_chunks(qs: QuietStar, given: Given, size: int) -> tuple[Tensor, Tensor, Seen]:
    """Last hidden states of the text [B,L,D], losses of its tokens [B,L-1], and what the chunks of ``size`` anchors say.

    Raises:
        ValueError: layers that are checkpointed with ``use_reentrant=True``, whose keys have no gradient.
    """
    text_pass = LeafPass(given.layout)
    embeds = embeddings(qs.model)(given.input_ids)
    text = decode_rows(qs.model, embeds, given.layout.text_position_ids(), text_pass)
    text_pass.done = True
    if torch.is_grad_enabled() and not text_pass.with_gradients:
        raise ValueError("anchor_chunk needs gradient checkpointing with use_reentrant=False, got use_reentrant=True")
    nll_base = -qs.lm_head.logprob(text[:, :-1], given.targets.base)
    parts = [
        checkpoint(_see, qs, given.select(places), text, text_pass.keys_values, use_reentrant=False)
        for places in split(given.layout.P, size)
    ]
    return text, nll_base, Seen(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


def _see(qs: QuietStar, given: Given, text: Tensor, keys_values: list[tuple[Tensor, Tensor]]) -> Seen:
    """One chunk, given the text."""
    layout = given.layout
    rows = qs._thought_rows(layout, given.input_ids, given.thought_ids)
    with layer_checkpoints_off(qs.model):
        hidden = decode_rows(qs.model, rows, layout.position_ids()[:, layout.L :], ChunkPass(layout, keys_values))
    thought = hidden.unflatten(1, (layout.P, layout.N, layout.S))
    h_base = qs._base_states(layout, text)
    ahead = qs._ahead(thought, given.thought_lengths)
    targets = given.targets.mix
    compared, nll_mix, weight = qs._mix(h_base.detach(), targets[:, :, 0], h_base, ahead, targets)
    return Seen(compared.detach(), nll_mix, weight, qs._logprob(thought, given.thought_ids, given.thought_lengths))


# Of the free memory, what "auto" plans with: gradients on the way, fragments and other programs take the rest.
SHARE = 0.7
# Positions of the text whose memory is worked out; a step's memory is linear in them.
SAMPLE = 64


@dataclass(frozen=True)
class Room:
    """What chunks are cut by: bytes that are free for activations, and those that a text position and an anchor take.

    Measured once, before the first chunk: later steps find their own rests in memory. So sizes follow from shapes alone.
    """

    config: ThoughtConfig
    free: int
    position: float
    anchor: float

    def chunk(self, B: int, L: int) -> int:
        """Anchors of each of B texts of L tokens that fit."""
        return int((self.free - B * L * self.position) // (B * self.anchor))


def chunk_size(qs: QuietStar, layout: ThoughtLayout) -> int:
    """Anchors of each text at a time: what ``qs.anchor_chunk`` says, from 1 to P."""
    size = qs.anchor_chunk
    if size == "auto":
        if qs.room is None or qs.room.config is not qs.thought_config:
            qs.room = measure_room(qs)
        size = qs.room.chunk(layout.B, layout.L)
    return layout.P if size is None else max(1, min(int(size), layout.P))


def measure_room(qs: QuietStar) -> Room:
    """Free memory less gradients and AdamW's moments that aren't there yet, and ``doctor``'s estimates."""
    config, weight = qs.thought_config, qs.lm_head.linear.weight
    memory = step_memory(qs.model.config, config, 1, SAMPLE, weight.dtype)
    missing = sum(3 * p.nbytes for p in qs.parameters() if p.requires_grad and p.grad is None)
    kept = memory.text / SAMPLE
    if any(getattr(module, "gradient_checkpointing", False) for module in qs.model.modules()):
        kept = memory.checkpointed / (SAMPLE * (1 + config.thoughts * config.rows))
    keys_values = memory.rollout / (SAMPLE * (1 + config.thoughts * config.thought_tokens))
    free = SHARE * free_memory(weight.device) - missing - memory.head
    return Room(config, int(free), kept + CHUNK_COPIES * keys_values, (memory.thoughts + memory.mixing) / SAMPLE)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil  # comes with accelerate; a GPU does without

    return psutil.virtual_memory().available
