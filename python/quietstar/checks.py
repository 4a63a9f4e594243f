"""Checks of the wrapper's arguments: texts, labels, ids, positions. Each error is one sentence."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quietstar.config import ThoughtConfig
from quietstar_kernels import ThoughtLayout

INTEGERS = (torch.int32, torch.int64)


def check_tensor(name: str, tensor: Tensor, letters: str, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must have shape [{letters}]={list(shape)}, got {got}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the model's embeddings, got {tensor.device}")


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    if ids.dtype not in INTEGERS:
        raise ValueError(f"{name} must be int32 or int64, got {str(ids.dtype).removeprefix('torch.')}")
    outside = (ids < 0) | (ids >= vocabulary)
    if bool(outside.any()):
        raise ValueError(f"{name} must be from 0 to V-1={vocabulary - 1}, got {int(ids[outside][0])}")


def check_special_ids(config: ThoughtConfig, vocabulary: int) -> None:
    for name in ("start_token_id", "end_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(f"{name} must be from 0 to V-1={vocabulary - 1}, got {token}")


def check_text(input_ids: Tensor, attention_mask: Tensor | None, config: ThoughtConfig, embed: nn.Embedding) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        got = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must have shape [B,L], got {got}")
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids must hold at least one text of one token, got shape {list(input_ids.shape)}")
    shape, device = tuple(input_ids.shape), embed.weight.device
    check_tensor("input_ids", input_ids, "B,L", shape, device)
    check_ids("input_ids", input_ids, len(embed.weight))
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, "B,L", shape, device)
    for name, token in (("start", config.start_token_id), ("end", config.end_token_id)):
        if token is None:
            continue
        held = input_ids == token if attention_mask is None else (input_ids == token) & (attention_mask != 0)
        if bool(held.any()):
            row, place = held.nonzero()[0].tolist()
            raise ValueError(f"input_ids must not hold the {name}-of-thought id {token}, row {row} does at position {place}")


def make_layout(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    anchors: Tensor | None,
    document_ids: Tensor | None,
    config: ThoughtConfig,
) -> ThoughtLayout:
    N, S = config.thoughts, config.rows
    if document_ids is not None:
        check_tensor("document_ids", document_ids, "B,L", tuple(input_ids.shape), input_ids.device)
        if attention_mask is not None:
            document_ids = document_ids.masked_fill(attention_mask == 0, -1)
        return ThoughtLayout.from_documents(document_ids, N, S, anchors=anchors)
    if attention_mask is not None:
        return ThoughtLayout.from_padding(attention_mask, N, S, anchors=anchors)
    if anchors is not None:
        if anchors.shape[:1] != input_ids.shape[:1]:
            raise ValueError(f"anchors must have shape [B,P]=[{len(input_ids)},?], got {list(anchors.shape)}")
        return ThoughtLayout.at(anchors, N, S, text_length=input_ids.shape[1])
    B, L = input_ids.shape
    return ThoughtLayout.every_position(B, L, N, S, device=input_ids.device)


def check_lookahead(layout: ThoughtLayout, config: ThoughtConfig) -> None:
    if layout.L < config.lookahead + 2:
        raise ValueError(
            f"input_ids must hold at least J+2={config.lookahead + 2} tokens to look {config.lookahead} ahead, got L={layout.L}"
        )


def check_labels(labels: Tensor | None, input_ids: Tensor, vocabulary: int) -> Tensor:
    if labels is None:
        return input_ids.long()
    check_tensor("labels", labels, "B,L", tuple(input_ids.shape), input_ids.device)
    check_ids("labels", labels.masked_fill(labels == -100, 0), vocabulary)
    return labels.long()


def with_lengths(layout: ThoughtLayout, thought_lengths: Tensor | None, config: ThoughtConfig) -> ThoughtLayout:
    """The layout with ``thought_lengths`` [B,P,N] sampled tokens in each thought that is on; unchanged for None."""
    if thought_lengths is None:
        return layout
    check_tensor("thought_lengths", thought_lengths, "B,P,N", (layout.B, layout.P, layout.N), layout.device)
    if thought_lengths.dtype not in INTEGERS:
        raise ValueError(f"thought_lengths must be int32 or int64, got {str(thought_lengths.dtype).removeprefix('torch.')}")
    outside = (thought_lengths < 0) | (thought_lengths > config.thought_tokens)
    if bool(outside.any()):
        got = int(thought_lengths[outside][0])
        raise ValueError(f"thought_lengths must be from 0 to T={config.thought_tokens}, got {got}")
    length = torch.where(layout.length > 0, thought_lengths + config.lookahead + 1, 0)
    return replace(layout, length=length.int().contiguous())


def check_thought_ids(
    thought_ids: Tensor, thought_lengths: Tensor | None, layout: ThoughtLayout, config: ThoughtConfig, vocabulary: int
) -> None:
    """Ids past the end of a thought may be anything."""
    shape = (layout.B, layout.P, layout.N, config.thought_tokens)
    check_tensor("thought_ids", thought_ids, "B,P,N,T", shape, layout.device)
    if thought_lengths is not None:
        thought_ids = thought_ids[sampled(thought_lengths, config.thought_tokens)]
    check_ids("thought_ids", thought_ids, vocabulary)
    for token in config.banned:
        if bool((thought_ids == token).any()):
            raise ValueError(f"thought_ids must not hold the start- or end-of-thought id {token}")


def sampled(thought_lengths: Tensor, thought_tokens: int) -> Tensor:
    """bool [B,P,N,T], True up to each thought's end."""
    return torch.arange(thought_tokens, device=thought_lengths.device) < thought_lengths[..., None]


def check_sequence_ids(sequence_ids: Tensor | None, input_ids: Tensor) -> Tensor:
    """int64 [B,L]; the row index where none are given."""
    B, L = input_ids.shape
    if sequence_ids is None:
        sequence_ids = torch.arange(B, device=input_ids.device)
    if tuple(sequence_ids.shape) not in ((B,), (B, L)):
        raise ValueError(f"sequence_ids must have shape [B]=[{B}] or [B,L]=[{B}, {L}], got {list(sequence_ids.shape)}")
    return (sequence_ids[:, None] if sequence_ids.ndim == 1 else sequence_ids).long().expand(B, L)


def pad_id(config: PretrainedConfig) -> int:
    """The config's pad id, else its end-of-text id, else 0; for places that no loss reads."""
    for token in (config.pad_token_id, config.eos_token_id):
        if isinstance(token, list):
            token = token[0] if token else None
        if token is not None and token >= 0:
            return token
    return 0


def check_positions(model: PreTrainedModel, layout: ThoughtLayout) -> None:
    """Raise ValueError where a text's thoughts pass the model's last position."""
    limits = position_limits(model)
    if limits:
        check_room(model, limits, int(layout.position_ids().max()) + 1)


def check_room(model: PreTrainedModel, limits: dict[str, int], needed: int) -> None:
    """``limits`` as ``position_limits`` returns them; ``needed`` counts text and thoughts."""
    for what, limit in limits.items():
        if needed > limit:
            raise ValueError(
                f"text and thoughts need {needed} positions and {type(model).__name__} has {limit} {what}: "
                "use a shorter text or shorter thoughts"
            )


def position_limits(model: PreTrainedModel) -> dict[str, int]:
    """The model's position limits: learned positions end, and some rotary ones change with the longest position in the call."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = learned_positions(model)
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        limits[f"positions before {rope['rope_type']} rotary embeddings change"] = original
    return limits


def learned_positions(model: PreTrainedModel) -> dict[str, int]:
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("wpe" in name or "position" in name)
    ]
    return {"learned positions": min(model.config.get_text_config().max_position_embeddings, *tables)} if tables else {}
