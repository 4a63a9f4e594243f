"""The base model, which rewards and the divergence compare thoughts with: what a language model predicts without them.

It continues the text as if the thought's tokens were part of it, without start vector and mixing head. It is the model itself,
a copy from before training (``frozen``), or a copy that follows the weights slowly (``ema``, RLP, arXiv 2510.01265, section 3).
Where adapters are trained, ``frozen`` is the model with its adapters switched off, without a copy.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.hf import adapters
from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import dropout_off, embeddings
from quietstar.objective import IGNORED, at_places, sampled
from quietstar.texts import Tables
from quietstar_kernels import ThoughtLayout


def copy_model(model: PreTrainedModel, averaged: bool) -> PreTrainedModel:
    """A copy without gradients; an averaged one is fp32, because an EMA step of 0.001 rounds to zero in bf16.

    Where the model has adapters, only these are copied; the other weights are shared.
    """
    if not adapters.there(model):
        twin = copy.deepcopy(model).requires_grad_(False)
        return twin.float() if averaged else twin
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    twin = copy.deepcopy(model, shared)
    for weight in twin.parameters():
        if averaged and weight.requires_grad:
            weight.data = weight.data.float()
    return twin.requires_grad_(False)


@torch.no_grad()
def follow(twin: nn.Module, model: nn.Module, decay: float) -> None:
    """phi <- decay * phi + (1 - decay) * theta, for every weight."""
    for mean, weight in zip(twin.parameters(), model.parameters(), strict=True):
        if mean is not weight:
            mean.lerp_(weight.to(mean.dtype), 1 - decay)


@torch.no_grad()
def target_nll(model: PreTrainedModel, head: LMHead, input_ids: Tensor, layout: ThoughtLayout, tables: Tables) -> Tensor:
    """[B,P,J], -log p of the text tokens after each anchor, nats; 0 where the target does not count."""
    text, _ = _hidden_states(model, input_ids, layout.text_only())
    return at_places(-head.of(model).logprob(text[:, :-1], tables.targets.base), tables.scored)


@torch.no_grad()
def thought_logprob(
    model: PreTrainedModel,
    head: LMHead,
    input_ids: Tensor,
    thought_ids: Tensor,
    layout: ThoughtLayout,
    banned: list[int],
    anchor_chunk: int,
) -> Tensor:
    """[B,P,N,T], log p of a thought's tokens as the text's continuation after the anchor, at temperature 1.

    The first token is predicted by the anchor's text row, token s + 1 by the row of token s.
    """
    T, parts = thought_ids.shape[-1], []
    for places in layout.chunks(anchor_chunk):
        ids, part = thought_ids[:, places], layout.select(places)
        length = (part.length - 1).clamp(0, T)  # a thought's rows begin with the start vector's
        packed = ThoughtLayout(part.anchor, part.lo, length, T)
        text, own = _hidden_states(model, torch.cat([input_ids, ids.flatten(1)], 1), packed)
        rows = torch.arange(part.B, device=text.device)[:, None]
        first = text[rows, part.anchor.long().clamp(min=0)][:, :, None, None].expand(-1, -1, part.N, 1, -1)
        own = own.unflatten(1, (part.P, part.N, T))
        targets = torch.where(sampled(part.length - (part.S - T), T), ids, IGNORED)
        parts.append(head.of(model).logprob(torch.cat([first, own[:, :, :, :-1]], 3), targets, banned=banned))
    return torch.cat(parts, 1)


def _hidden_states(model: PreTrainedModel, token_ids: Tensor, layout: ThoughtLayout) -> tuple[Tensor, Tensor]:
    with dropout_off(model):
        hidden = decode_rows(model, embeddings(model)(token_ids), layout.position_ids(), PackedPass(layout))
    text, thoughts = hidden.split([layout.L, layout.R], 1)
    return text, thoughts
