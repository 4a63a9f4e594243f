"""Scores the last tokens of sequences, such as completions. What they begin with runs once, and no full logits are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import embeddings
from quietstar_kernels import ThoughtLayout, linear_logprob
from quietstar_kernels.checks import INTEGERS, MASKS, integer, tensor


def without_padding(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> tuple[list[Tensor], Tensor]:
    """The sequences int64 [length] of padded rows and, bool [B,T], which of their last tokens are there. All on the host.

    Args:
        input_ids: int32 or int64 [B,L], prompts and then completions of T tokens. Prompts are padded on the left, completions
            on the right.
        attention_mask: bool or integer [B,L], 0 for padding.
        completion_length: T, from 1 to L-1.
    """
    tensor("input_ids", input_ids, "B,L", {}, input_ids.device, INTEGERS)
    B, L = input_ids.shape
    tensor("attention_mask", attention_mask, "B,L", {"B": B, "L": L}, input_ids.device, MASKS)
    T = integer("completion_length", completion_length, 1, L - 1)
    padded = input_ids.long().masked_fill(attention_mask == 0, -1).cpu()
    shown, live = (padded >= 0).split([L - T, T], 1)
    rules = {
        "prompts must be padded on the left alone": (shown[:, 1:] < shown[:, :-1]).any(1),
        "prompts must hold at least one token": ~shown.any(1),
        "completions must be padded on the right alone": (live[:, 1:] > live[:, :-1]).any(1),
    }
    for row, rule in torch.stack(list(rules.values()), 1).nonzero()[:1].tolist():
        raise ValueError(f"attention_mask: {list(rules)[rule]}, broken in row {row}")
    return [ids[ids >= 0] for ids in padded], live


def end_logprobs(
    model: PreTrainedModel,
    head: LMHead,
    sequences: list[Tensor],
    live: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    autocast_head: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the last tokens of sequences and entropies of their predictions, fp32 [B,T] (fp64 from fp64), nats.

    Both are 0 where ``live`` is False. Differentiable.

    Args:
        model: with attention "quietstar" or "quietstar_wrapped".
        head: the model's, from ``find_lm_head``.
        sequences: int64 [length] on the host, one at least not empty.
        live: bool [B,T] on the host. Row i has a True for each last token of sequence i that is scored, one fewer than it has
            tokens at most: the first can't be scored.
        autocast_head: whether the head runs in autocast's dtype, where that is on, or in its own.
    """
    # 1. The tree of the sequences, a row for each distinct token. Nothing follows a last token, so it needs no row; but without
    # any row the result would not depend on the model.
    layout, token_ids, paths = ThoughtLayout.from_sequences([ids[: max(len(ids) - 1, 1)] for ids in sequences])
    # 2. What is scored: the row before each token predicts it. A token that several sequences share is scored once.
    predicting_rows, target_ids, keys = [], [], []
    last_keys = torch.arange(layout.M, layout.M + len(sequences)).split(1)
    for ids, path, count, last_key in zip(sequences, paths, live.sum(1).tolist(), last_keys, strict=True):
        first, end = len(ids) - count, len(ids)
        predicting_rows.append(path[first - 1 : end - 1])
        target_ids.append(ids[first:])
        # A token is the same in two sequences if its row is. A last one without a row gets a key of its own.
        keys.append(torch.cat([path, last_key])[first:end])
    key = torch.cat(keys)
    is_used = torch.zeros(layout.M + len(sequences), dtype=torch.bool).index_fill(0, key, True)
    slot = (is_used.cumsum(0) - 1)[key]
    # Tokens with the same key write the same values.
    rows, targets = (key.new_zeros(int(is_used.sum())).scatter(0, slot, torch.cat(x)) for x in (predicting_rows, target_ids))

    # 3. One forward; log-probabilities and entropies come from its hidden states, without logits.
    layout = layout.to(model.device)
    token_ids, rows, targets, slot, live = (x.to(model.device) for x in (token_ids, rows, targets, slot, live))
    packed = PackedPass(layout)
    packed.positions = max(map(len, sequences))  # the layout's own bound counts all sequences as one text
    hidden = decode_rows(model, embeddings(model)(token_ids), layout.position_ids(), packed)[0]
    head = head.of(model)
    with nullcontext() if autocast_head else torch.autocast(hidden.device.type, enabled=False):
        out = head.apply(linear_logprob, hidden[rows], targets, temperature=temperature, return_entropy=return_entropy)

    # 4. Back to the tokens of each sequence.
    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(live.shape).masked_scatter(live, values[slot])

    logprob, entropy = out if isinstance(out, tuple) else (out, None)
    return spread(logprob), None if entropy is None else spread(entropy)


@contextmanager
def answering(model: PreTrainedModel, answer: Callable[[], Any]) -> Iterator[None]:
    """In this context ``model()`` returns ``answer()``, which calls the decoder.

    Wrappers still run around it, so gradients are synchronised and dtypes cast.
    """
    own = vars(model).get("forward")
    model.forward = lambda *_, **__: answer()  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own  # type: ignore[method-assign]
