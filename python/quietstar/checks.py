"""Checks of the wrapper's arguments: texts, labels, ids, positions. Each error is one sentence."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from quietstar.arguments.values import FLOATS, INTEGERS, MASKS, instance, seed_bits, shown, tensor
from quietstar.config import ThoughtConfig
from quietstar_kernels import ThoughtLayout


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    check_range(name, ids, vocabulary - 1, "V-1")


def check_range(name: str, values: Tensor, most: int, letter: str) -> None:
    """Reads the values, from 0 to ``most``, which a message calls ``letter``."""
    outside = (values < 0) | (values > most)
    if bool(outside.any()):
        raise ValueError(f"{name} must be from 0 to {letter}={most}, got {int(values[outside][0])}")


def check_config(config: ThoughtConfig, vocabulary: int) -> ThoughtConfig:
    instance("config", config, ThoughtConfig)
    for name in ("start_token_id", "end_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(f"config: {name} must be from 0 to V-1={vocabulary - 1}, got {token}")
    return config


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    return None if tokenizer is None else instance("tokenizer", tokenizer, PreTrainedTokenizerBase)


def check_seed(seed: int | None) -> int | None:
    return None if seed is None else seed_bits("seed", seed)


def check_text(input_ids: Tensor, attention_mask: Tensor | None, config: ThoughtConfig, embed: nn.Embedding) -> None:
    device = embed.weight.device
    tensor("input_ids", input_ids, "B,L", {}, device, INTEGERS)
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids must hold at least one text of one token, got shape {list(input_ids.shape)}")
    check_ids("input_ids", input_ids, len(embed.weight))
    if attention_mask is not None:
        tensor("attention_mask", attention_mask, "B,L", _sizes(input_ids), device, MASKS)
    for name, token in (("start", config.start_token_id), ("end", config.end_token_id)):
        if token is None:
            continue
        held = input_ids == token if attention_mask is None else (input_ids == token) & (attention_mask != 0)
        if bool(held.any()):
            row, place = held.nonzero()[0].tolist()
            raise ValueError(f"input_ids must not hold the {name}-of-thought id {token}, row {row} does at position {place}")


def _sizes(input_ids: Tensor) -> dict[str, int]:
    return {"B": input_ids.shape[0], "L": input_ids.shape[1]}


def make_layout(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    anchors: Tensor | None,
    document_ids: Tensor | None,
    config: ThoughtConfig,
) -> ThoughtLayout:
    N, S, device = config.thoughts, config.rows, input_ids.device
    if anchors is not None:
        tensor("anchors", anchors, "B,P", {"B": len(input_ids)}, device, INTEGERS)
    if document_ids is not None:
        tensor("document_ids", document_ids, "B,L", _sizes(input_ids), device, INTEGERS)
        if attention_mask is not None:
            document_ids = document_ids.masked_fill(attention_mask == 0, -1)
        return ThoughtLayout.from_documents(document_ids, N, S, anchors=anchors)
    if attention_mask is not None:
        return ThoughtLayout.from_padding(attention_mask, N, S, anchors=anchors)
    if anchors is not None:
        return ThoughtLayout.at(anchors, N, S, text_length=input_ids.shape[1])
    B, L = input_ids.shape
    return ThoughtLayout.every_position(B, L, N, S, device=device)


def check_lookahead(layout: ThoughtLayout, config: ThoughtConfig) -> None:
    if layout.L < config.lookahead + 2:
        raise ValueError(
            f"input_ids must hold at least J+2={config.lookahead + 2} tokens to look {config.lookahead} ahead, got L={layout.L}"
        )


def check_labels(labels: Tensor | None, input_ids: Tensor, vocabulary: int) -> Tensor:
    if labels is None:
        return input_ids.long()
    tensor("labels", labels, "B,L", _sizes(input_ids), input_ids.device, INTEGERS)
    check_ids("labels", labels.masked_fill(labels == -100, 0), vocabulary)
    return labels.long()


def with_lengths(layout: ThoughtLayout, thought_lengths: Tensor | None, config: ThoughtConfig) -> ThoughtLayout:
    """The layout with ``thought_lengths`` [B,P,N] sampled tokens in each thought that is on; unchanged for None."""
    if thought_lengths is None:
        return layout
    tensor("thought_lengths", thought_lengths, "B,P,N", _thought_sizes(layout, config), layout.device, INTEGERS)
    check_range("thought_lengths", thought_lengths, config.thought_tokens, "T")
    length = torch.where(layout.length > 0, thought_lengths + config.lookahead + 1, 0)
    return replace(layout, length=length.int().contiguous())


def check_thought_ids(
    thought_ids: Tensor, thought_lengths: Tensor | None, layout: ThoughtLayout, config: ThoughtConfig, vocabulary: int
) -> None:
    """Ids past the end of a thought may be anything."""
    tensor("thought_ids", thought_ids, "B,P,N,T", _thought_sizes(layout, config), layout.device, INTEGERS)
    if thought_lengths is not None:
        thought_ids = thought_ids[sampled(thought_lengths, config.thought_tokens)]
    check_ids("thought_ids", thought_ids, vocabulary)
    for token in config.banned:
        if bool((thought_ids == token).any()):
            raise ValueError(f"thought_ids must not hold the start- or end-of-thought id {token}")


def check_old_logprob(old_logprob: Tensor | None, layout: ThoughtLayout, config: ThoughtConfig) -> None:
    if old_logprob is not None:
        tensor("old_logprob", old_logprob, "B,P,N,T", _thought_sizes(layout, config), layout.device, FLOATS)


def _thought_sizes(layout: ThoughtLayout, config: ThoughtConfig) -> dict[str, int]:
    return {"B": layout.B, "P": layout.P, "N": layout.N, "T": config.thought_tokens}


def check_packed(
    layout: ThoughtLayout, input_ids: Tensor, config: ThoughtConfig, embed: nn.Embedding, thought_ids: Tensor | None = None
) -> None:
    """Raises ValueError where a layout is not of the config, the text or the thoughts. The text is read on a CPU alone."""
    check_layout(layout, config)
    device, sizes = embed.weight.device, _thought_sizes(layout, config)
    tensor("input_ids", input_ids, "B,L", {"B": layout.B, "L": layout.L}, device, INTEGERS)
    if thought_ids is not None:
        tensor("thought_ids", thought_ids, "B,P,N,T", sizes, device, INTEGERS)
    if device.type == "cpu":
        check_ids("input_ids", input_ids, len(embed.weight))


def check_layout(layout: ThoughtLayout, config: ThoughtConfig) -> None:
    instance("layout", layout, ThoughtLayout)
    if layout.S != config.rows:
        raise ValueError(f"layout must have S=T+J+1={config.rows} rows in a thought, got {layout.S}")


def sampled(thought_lengths: Tensor, thought_tokens: int) -> Tensor:
    """bool [B,P,N,T], True up to each thought's end."""
    return torch.arange(thought_tokens, device=thought_lengths.device) < thought_lengths[..., None]


def check_sequence_ids(sequence_ids: Tensor | None, input_ids: Tensor) -> Tensor:
    """int64 [B,L]; the row index where none are given."""
    B, L = input_ids.shape
    if sequence_ids is None:
        sequence_ids = torch.arange(B, device=input_ids.device)
    if not isinstance(sequence_ids, Tensor) or tuple(sequence_ids.shape) not in ((B,), (B, L)):
        got = list(sequence_ids.shape) if isinstance(sequence_ids, Tensor) else shown(sequence_ids)
        raise ValueError(f"sequence_ids must have shape [B]=[{B}] or [B,L]=[{B}, {L}], got {got}")
    tensor("sequence_ids", sequence_ids, ",".join("BL"[: sequence_ids.ndim]), {}, input_ids.device, INTEGERS)
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


def check_room(model: PreTrainedModel, limits: dict[str, int], needed: int, names: str = "input_ids") -> None:
    """``limits`` as ``position_limits`` returns them; ``needed`` counts text and thoughts; ``names`` begins the message."""
    for what, limit in limits.items():
        if needed > limit:
            raise ValueError(
                f"{names}: text and thoughts need {needed} positions and {type(model).__name__} has {limit} {what}: "
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
