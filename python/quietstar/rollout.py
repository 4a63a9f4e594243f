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

    B, P, N = layout.B, layout.P, layout.N
    embed = embeddings(model)
    text_positions = layout.text_position_ids()
    anchor = layout.anchor.long().clamp(min=0)
    position = text_positions.gather(1, anchor)  # [B,P]
    counters = torch.stack(
        [
            sequence_ids.gather(1, anchor).int()[:, :, None].expand(B, P, N),
            position.int()[:, :, None].expand(B, P, N),
            torch.arange(N, dtype=torch.int32, device=start.device).expand(B, P, N),
            torch.zeros((B, P, N), dtype=torch.int32, device=start.device),
        ],
        -1,
    )
    # Rows that are off keep position 0: past the text they could leave a table of learned positions.
    row_position = position[:, :, None].expand(B, P, N).masked_fill(layout.length == 0, -1)
    length = layout.length.clamp(max=thought_tokens)
    store = ThoughtStore(ThoughtLayout(layout.anchor, layout.lo, length, thought_tokens))

    with dropout_off(model):
        decode_rows(model, embed(input_ids), text_positions, store.prefill())
        tokens, logprobs = [], []
        embeds = start.expand(B, P * N, -1)
        for step in range(thought_tokens):
            position_ids = (row_position + 1 + step).masked_fill(layout.length <= step, 0).flatten(1)
            hidden = decode_rows(model, embeds, position_ids, store.decode(step))
            counters[..., 3] = step
            ids, logprob = head.sample(hidden.view(B, P, N, -1), counters, seed, temperature, banned or [])
            tokens.append(ids)
            logprobs.append(logprob)
            embeds = embed(ids.flatten(1))
    return Thoughts(torch.stack(tokens, -1), torch.stack(logprobs, -1))
