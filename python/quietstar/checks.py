"""Checks of the wrapper's arguments, made once where they come in: texts, labels, ids, positions. What is below trusts them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quietstar.config import ThoughtConfig
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import FLOATS, INTEGERS, MASKS, instance, number, on_host, refuse_where, seed_bits, shown, tensor


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    check_range(name, ids, vocabulary - 1, "V-1")


def check_range(name: str, values: Tensor, most: int, letter: str) -> None:
    """From 0 to ``most``, which a message calls ``letter``."""
    outside = (values < 0) | (values > most)
    refuse_where(outside, f"{name} must be from 0 to {letter}={most}", lambda: f", got {int(values[outside][0])}")


def check_config(config: ThoughtConfig, vocabulary: int) -> ThoughtConfig:
    instance("config", config, ThoughtConfig)
    for name in ("start_token_id", "end_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(f"config: {name} must be from 0 to V-1={vocabulary - 1}, got {token}")
    return config


def check_seed(seed: int | None) -> int | None:
    return None if seed is None else seed_bits("seed", seed)


def check_think(name: str, think: str | float) -> str | float:
    """ "always", "never", or a number of nats."""
    if isinstance(think, str) and think in ("always", "never"):
        return think
    return number(name, think, "'always', 'never' or nats of entropy, 0 or more", least=0)


def check_text(input_ids: Tensor, attention_mask: Tensor | None, config: ThoughtConfig, embed: nn.Embedding) -> None:
    """The text may be on the CPU, where its values are read, whatever the model is on."""
    host = isinstance(input_ids, Tensor) and on_host(input_ids)
    device = input_ids.device if host else embed.weight.device
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
        refuse_where(held, f"input_ids must not hold the {name}-of-thought id {token}", partial(_place, held))


def check_inputs(
    input_ids: Tensor, sequence_ids: Tensor | None, labels: Tensor | None, embed: nn.Embedding, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Sequence ids and labels, int64 [B,L], of a text that the model can read."""
    check_device(input_ids, embed)
    return check_sequence_ids(sequence_ids, input_ids), check_labels(labels, input_ids, vocabulary)


def check_device(input_ids: Tensor, embed: nn.Embedding) -> None:
    """``check_text`` lets a text on the CPU pass, which a model elsewhere can't read."""
    tensor("input_ids", input_ids, "...", {}, embed.weight.device)


def _place(held: Tensor) -> str:
    row, place = held.nonzero()[0].tolist()
    return f", row {row} does at position {place}"


def _sizes(input_ids: Tensor) -> dict[str, int]:
    return {"B": input_ids.shape[0], "L": input_ids.shape[1]}


def make_layout(
    input_ids: Tensor, attention_mask: Tensor | None, anchors: Tensor | None, document_ids: Tensor | None, config: ThoughtConfig
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


def check_thoughts(
    thought_ids: Tensor | None,
    thought_lengths: Tensor | None,
    old_logprob: Tensor | None,
    layout: ThoughtLayout,
    config: ThoughtConfig,
    vocabulary: int,
) -> ThoughtLayout:
    """The layout with these lengths. Ids past the end of a thought may be anything."""
    layout = with_lengths(layout, thought_lengths, config)
    if old_logprob is not None:
        tensor("old_logprob", old_logprob, "B,P,N,T", _thought_sizes(layout, config), layout.device, FLOATS)
    if thought_ids is None:
        return layout
    tensor("thought_ids", thought_ids, "B,P,N,T", _thought_sizes(layout, config), layout.device, INTEGERS)
    on = torch.ones_like(thought_ids, dtype=torch.bool)
    if thought_lengths is not None:
        on = sampled(thought_lengths, config.thought_tokens)
    check_ids("thought_ids", thought_ids.where(on, 0), vocabulary)
    for token in config.banned:
        refuse_where(on & (thought_ids == token), f"thought_ids must not hold the start- or end-of-thought id {token}")
    return layout


def _thought_sizes(layout: ThoughtLayout, config: ThoughtConfig) -> dict[str, int]:
    return {"B": layout.B, "P": layout.P, "N": layout.N, "T": config.thought_tokens}


def check_layout(layout: ThoughtLayout, input_ids: Tensor, attention_mask: Tensor | None, config: ThoughtConfig) -> None:
    """Raises ValueError unless ``Thinker.layout`` can have made it of these texts."""
    instance("layout", layout, ThoughtLayout)
    tensor("input_ids", input_ids, "B,L", {"B": layout.B, "L": layout.L}, layout.device, INTEGERS)
    if attention_mask is not None:
        tensor("attention_mask", attention_mask, "B,L", _sizes(input_ids), layout.device, MASKS)
    if layout.S != config.rows or layout.N != config.thoughts:
        wanted = f"N={config.thoughts} thoughts of S=T+J+1={config.rows} rows"
        raise ValueError(f"layout must have {wanted}, got N={layout.N}, S={layout.S}")


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
