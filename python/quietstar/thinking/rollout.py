"""Parallel sampling: all thoughts of all anchors advance together, one row per step (Quiet-STaR, section 4.2; no gradient)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import ThoughtConfig
from quietstar.hf.decoder import ThoughtStore, decode_step, decode_text
from quietstar.hf.graphs import Runner
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import dropout_off, embeddings, largest, not_finite, sharding_group
from quietstar.objective import sampled
from quietstar.texts import Texts
from quietstar_kernels import ThoughtLayout


@dataclass
class Thoughts:
    """Sampled thoughts.

    Attributes:
        thought_ids: int64 [B,P,N,T]; 0 past the end of a thought, -1 where the model's logits are not finite.
        logprob: fp32 [B,P,N,T], at the sampling temperature; 0 past the end of a thought.
        thought_lengths: int64 [B,P,N], sampled tokens of each thought; None where all have T.
    """

    thought_ids: Tensor
    logprob: Tensor
    thought_lengths: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """int64 [B,P,N], sampled tokens of each thought."""
        if self.thought_lengths is not None:
            return self.thought_lengths
        return torch.full_like(self.thought_ids[..., 0], self.thought_ids.shape[-1])

    def cut(self, thought_lengths: Tensor | None) -> Thoughts:
        """No thought longer than ``thought_lengths`` [B,P,N]; unchanged for None."""
        if thought_lengths is None:
            return self
        lengths = thought_lengths.long()
        lengths = lengths if self.thought_lengths is None else torch.minimum(lengths, self.thought_lengths)
        on = sampled(lengths, self.thought_ids.shape[-1])
        return Thoughts(torch.where(on, self.thought_ids, 0), torch.where(on, self.logprob, 0), lengths)

    def checked(self, model: PreTrainedModel, layout: ThoughtLayout) -> Thoughts:
        """The same; raises ValueError if an id is -1. Waits for the device."""
        if bool((self.thought_ids < 0).any()):
            b, p, *_ = (self.thought_ids < 0).nonzero()[0].tolist()
            raise not_finite(model, f"at text {b}, position {int(layout.anchor[b, p])}")
        return self

    def copies(self, N: int) -> Thoughts:
        """The only thought of each anchor, N times."""
        return Thoughts(**{name: x.repeat_interleave(N, 2) for name, x in vars(self).items() if x is not None})

    @staticmethod
    def join(parts: list[Thoughts]) -> Thoughts:
        """The thoughts of all anchors, from those of consecutive runs of anchors."""
        present = [name for name, x in vars(parts[0]).items() if x is not None]
        return Thoughts(**{name: torch.cat([getattr(part, name) for part in parts], 1) for name in present})


@dataclass(frozen=True)
class Stop:
    """A thought ends instead of sampling a token where the probability of token ``end`` exceeds ``threshold``."""

    end: int
    threshold: float


@dataclass(frozen=True)
class RolloutOptions:
    """How thoughts are sampled."""

    thought_tokens: int  # T
    temperature: float  # 0 takes the most likely token
    banned: tuple[int, ...]  # ids that are never drawn
    stop: Stop | None  # when thoughts end early; None: all have T tokens

    @staticmethod
    def of(config: ThoughtConfig, temperature: float) -> RolloutOptions:
        end, threshold = config.end_token_id, config.stop_threshold
        stop = None if end is None or threshold is None else Stop(end, threshold)
        return RolloutOptions(config.thought_tokens, temperature, tuple(config.banned), stop)


@torch.no_grad()
def sample_vector_thoughts(
    model: PreTrainedModel,
    head: LMHead,
    start: Tensor,
    texts: Texts,
    seed: int,
    sampling: RolloutOptions,
    anchor_chunk: int,
    run: Runner,
) -> Thoughts:
    """Sample T tokens for every thought of some texts, whose S is at least T; the text runs once.

    Args:
        start: [D], the start vector as the decoder sees it.
        texts: S - T rows of each thought are not sampled; shorter thoughts have fewer sampled rows.
        seed: 64 bits; with (sequence id, position from lo, n, s) it fixes every random number.
        sampling: at temperature 0 one thought is made for all N of an anchor.
        anchor_chunk: anchors that advance together.
        run: runs the rollout, perhaps as a CUDA graph.
    """
    layout, N, T = texts.layout, texts.layout.N, sampling.thought_tokens
    if sampling.temperature == 0:
        layout = replace(layout, length=layout.length.amax(2, keepdim=True))

    # A function of tensors, so that it can be captured as a CUDA graph.
    def rollout(
        start: Tensor,
        input_ids: Tensor,
        anchor: Tensor,
        lo: Tensor,
        length: Tensor,
        sequence_ids: Tensor,
        seed: Tensor,
        whole: bool,
    ) -> tuple[Tensor, ...]:
        layout = ThoughtLayout(anchor, lo, length, T)
        runs = layout.chunks(anchor_chunk)
        store = ThoughtStore(layout.select(runs[0]))
        decode_text(model, embeddings(model)(input_ids), store)
        parts: list[Thoughts] = []
        for places in runs:
            if parts:
                store.begin(layout.select(places))
            parts.append(continue_thoughts(model, head, start, store, sequence_ids[:, places], seed, sampling, whole=whole)[0])
        thoughts = Thoughts.join(parts)
        tensors = (thoughts.thought_ids, thoughts.logprob, thoughts.thought_lengths)
        return tuple(x for x in tensors if x is not None)

    inputs = {
        "start": start,
        "input_ids": texts.input_ids,
        "anchor": layout.anchor,
        "lo": layout.lo,
        "length": (layout.length - (layout.rows - T)).clamp(min=0),
        "sequence_ids": texts.sequence_ids.gather(1, layout.anchor.long().clamp(min=0)),
        "seed": on_device(seed, start.device),
    }
    with dropout_off(model):
        thoughts = Thoughts(*run(("rollout", sampling), rollout, inputs))
    return thoughts.copies(N) if sampling.temperature == 0 else thoughts


def continue_thoughts(
    model: PreTrainedModel,
    head: LMHead,
    start: Tensor,
    store: ThoughtStore,
    sequence_ids: Tensor,
    seed: Tensor,
    sampling: RolloutOptions,
    end: Tensor | None = None,
    whole: bool = False,
) -> tuple[Thoughts, Tensor | None]:
    """The T steps of ``sample_vector_thoughts`` over a text in ``store``; ``sequence_ids`` [B,P] are those of the anchors.

    No step decides anything on the host, with one exception: where thoughts may stop early, the loop ends with the last one,
    of all processes where weights are sharded.

    Args:
        seed: int64 [].
        end: [D], the end vector, for at most two more steps; the second result is then the last hidden states [B,P,N,D] of
            the end rows.
        whole: take all steps, even where every thought has stopped; the result is the same.
    """
    layout, embed, T = store.layout, embeddings(model), sampling.thought_tokens
    B, P, N = layout.B, layout.P, layout.N
    position = layout.text_position_ids().gather(1, layout.anchor.long().clamp(min=0))
    counters = torch.zeros((B, P, N, 4), dtype=torch.int32, device=start.device)
    counters[..., 0], counters[..., 1] = sequence_ids[:, :, None], position[:, :, None]
    counters[..., 2] = torch.arange(N, device=start.device)
    ids = torch.zeros((B, P, N, T), dtype=torch.int64, device=start.device)
    logprob = torch.zeros((B, P, N, T), device=start.device)
    lengths = layout.length.long().clamp(max=T)
    embeds = start.repeat(B, P * N, 1)
    ends, group = None, None if whole or sampling.stop is None else sharding_group(model)
    for step in range(T if end is None else T + 2):
        hidden = decode_step(model, embeds, store, step).unflatten(1, (P, N))
        if end is not None:
            ends = hidden if ends is None else torch.where((lengths + 1 == step)[..., None], hidden, ends)
        if sampling.stop is not None:
            if step < T:
                likely = head.logprob(hidden, torch.full_like(lengths, sampling.stop.end)).exp() > sampling.stop.threshold
                lengths = torch.where(likely, lengths.clamp(max=step), lengths)
            running = (lengths > step if end is None else lengths >= step).any()
            if not whole and not largest(group, int(running), start.device):
                break
        if step < T:
            counters[..., 3].fill_(step)
            ids[..., step], logprob[..., step] = head.sample(hidden, counters, seed, sampling.temperature, sampling.banned)
            embeds = embed(ids[..., step].flatten(1).clamp(min=0))
        if end is not None:
            embeds = torch.where((lengths == step).flatten(1)[..., None], end, embeds)
    thoughts = Thoughts(ids, logprob).cut(lengths)
    return (replace(thoughts, thought_lengths=None) if sampling.stop is None else thoughts), ends


def on_device(seed: int, device: torch.device) -> Tensor:
    """64 bits as int64 [], without a copy from the host."""
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """Integers of the host, as int64 in the shape of their sequences; nothing waits for the device."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostCopy:
    """Values on their way from the device: ``tolist`` waits for what was queued before this, not after it."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", non_blocking=values.is_cuda)  # another device has no event to wait for
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def tolist(self) -> list[Any]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def draw_seed() -> int:
    """64 bits from torch's generator."""
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
