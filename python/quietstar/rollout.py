"""Parallel sampling: all thoughts of all anchors advance together, one row a step (Quiet-STaR, section 4.2; no gradient)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.cache import ThoughtPass, ThoughtStore, check_arrived
from quietstar.lm_head import LMHead
from quietstar.parts import backbone, dropout_off, embeddings
from quietstar_kernels import ThoughtLayout


@dataclass
class Thoughts:
    """Sampled thoughts.

    Attributes:
        thought_ids: int64 [B,P,N,T].
        logprob: fp32 [B,P,N,T], at the sampling temperature.
    """

    thought_ids: Tensor
    logprob: Tensor


def decode_rows(model: PreTrainedModel, embeds: Tensor, position_ids: Tensor, thought_pass: ThoughtPass) -> Tensor:
    """One forward of the decoder with thoughts: embeds [B,rows,D] to last hidden states [B,rows,D]."""
    ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    hidden = backbone(model)(
        inputs_embeds=embeds,
        attention_mask=ones,
        position_ids=position_ids,
        use_cache=False,
        thought_layout=thought_pass,
    ).last_hidden_state
    check_arrived(thought_pass, model)
    return hidden


@torch.no_grad()
def sample_thoughts(
    model: PreTrainedModel,
    head: LMHead,
    start: Tensor,
    input_ids: Tensor,
    layout: ThoughtLayout,
    sequence_ids: Tensor,
    seed: int,
    thought_tokens: int,
    temperature: float = 1.0,
    banned: list[int] | None = None,
) -> Thoughts:
    """Sample T tokens for every thought of ``layout``, whose S is at least T; the text runs once.

    Args:
        start: [D], the start vector as the decoder sees it.
        input_ids: int64 [B,L].
        sequence_ids: integer [B,L], the first sampling counter of each position.
        seed: 64 bits; with (sequence id, position from lo, n, s) it fixes every random number.
        temperature: 0 takes the most likely token, once for all N thoughts of an anchor.
    """
    if temperature == 0 and layout.N > 1:
        one = ThoughtLayout(layout.anchor, layout.lo, layout.length[:, :, :1].contiguous(), layout.rows)
        greedy = sample_thoughts(model, head, start, input_ids, one, sequence_ids, seed, thought_tokens, temperature, banned)
        shape = (-1, -1, layout.N, -1)
        return Thoughts(greedy.thought_ids.expand(shape).contiguous(), greedy.logprob.expand(shape).contiguous())

    length = layout.length.clamp(max=thought_tokens)
    store = ThoughtStore(ThoughtLayout(layout.anchor, layout.lo, length, thought_tokens))
    names = sequence_ids.gather(1, layout.anchor.long().clamp(min=0))
    with dropout_off(model):
        decode_rows(model, embeddings(model)(input_ids), layout.text_position_ids(), store.prefill())
        return continue_thoughts(model, head, start, store, names, seed, thought_tokens, temperature, banned)


def continue_thoughts(
    model: PreTrainedModel,
    head: LMHead,
    start: Tensor,
    store: ThoughtStore,
    sequence_ids: Tensor,
    seed: int,
    thought_tokens: int,
    temperature: float = 1.0,
    banned: list[int] | None = None,
) -> Thoughts:
    """The T steps of ``sample_thoughts`` over a text that ``store`` holds; ``sequence_ids`` [B,P] are those of the anchors."""
    layout, embed = store.layout, embeddings(model)
    B, P, N = layout.B, layout.P, layout.N
    position = layout.text_position_ids().gather(1, layout.anchor.long().clamp(min=0))
    counters = torch.stack(
        [
            sequence_ids.int()[:, :, None].expand(B, P, N),
            position.int()[:, :, None].expand(B, P, N),
            torch.arange(N, dtype=torch.int32, device=start.device).expand(B, P, N),
            torch.zeros((B, P, N), dtype=torch.int32, device=start.device),
        ],
        -1,
    )
    tokens, logprobs = [], []
    embeds = start.expand(B, P * N, -1)
    for step in range(thought_tokens):
        hidden = decode_step(model, embeds, store, step)
        counters[..., 3] = step
        ids, logprob = head.sample(hidden.view(B, P, N, -1), counters, seed, temperature, banned or [])
        tokens.append(ids)
        logprobs.append(logprob)
        embeds = embed(ids.flatten(1))
    return Thoughts(torch.stack(tokens, -1), torch.stack(logprobs, -1))


def decode_step(model: PreTrainedModel, embeds: Tensor, store: ThoughtStore, step: int) -> Tensor:
    """Row ``step`` of all thoughts of the store: embeds [B,P*N,D] to last hidden states [B,P*N,D]."""
    layout = store.layout
    positions = layout.position_ids()[:, layout.L :].unflatten(1, (layout.P * layout.N, layout.S))
    return decode_rows(model, embeds, positions[:, :, step], store.decode(step))


def draw_seed() -> int:
    """64 bits from torch's generator."""
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
