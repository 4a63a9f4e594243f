"""Forwards of the decoder over rows of text and thoughts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.hf.cache import ThoughtPass, ThoughtStore, check_arrived
from quietstar.hf.modules import backbone


def decode_rows(model: PreTrainedModel, embeds: Tensor, position_ids: Tensor, thought_pass: ThoughtPass) -> Tensor:
    """One forward of the decoder with thoughts: embeds [B,rows,D] to last hidden states [B,rows,D].

    Raises:
        ValueError: an attention call was made without ``thought_pass``.
    """
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


def decode_step(model: PreTrainedModel, embeds: Tensor, store: ThoughtStore, step: int) -> Tensor:
    """Row ``step`` of every thought in the store: embeds [B,P*N,D] to last hidden states [B,P*N,D]."""
    return decode_rows(model, embeds, store.positions[:, :, step], store.decode(step))
