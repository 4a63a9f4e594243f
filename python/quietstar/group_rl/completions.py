"""Scores the last tokens of sequences, such as completions. What they begin with runs once, and no full logits are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import device_of, embeddings
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


@dataclass(frozen=True)
class EndTokens:
    """The tree of some sequences, and the last tokens of each that are scored. All on the host.

    A token that several sequences share is scored once at each of its temperatures: U tokens in all.

    Attributes:
        layout, token_ids: the tree with a row for each distinct token, and the tokens int64 [1,M] of its rows.
        positions: a bound on position ids.
        rows: int64 [U], the row of the tree that predicts each token.
        targets: int64 [U], the tokens, those of one temperature after another.
        temperatures: each temperature, and how many of the tokens it is for.
        slot: int64, which of the U tokens each True of ``live`` is.
        live: bool [B,T], True for the scored tokens of each sequence.
    """

    layout: ThoughtLayout
    token_ids: Tensor
    positions: int
    rows: Tensor
    targets: Tensor
    temperatures: list[tuple[float, int]]
    slot: Tensor
    live: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Tensor], live: Tensor, temperatures: float | Sequence[Tensor] = 1.0) -> EndTokens:
        """The tree of ``sequences``.

        Args:
            sequences: int64 [length] on the host, one at least not empty.
            live: bool [B,T] on the host. Row i has a True for each last token of sequence i that is scored, one fewer than it
                has tokens at most: the first can't be scored.
            temperatures: one for all, or of each sequence's tokens, fp64 [length] on the host.
        """
        if isinstance(temperatures, float):
            temperatures = [ids.new_full(ids.shape, temperatures, dtype=torch.float64) for ids in sequences]
        # 1. A row for each distinct token. Nothing follows a last token, so it needs no row; but without any row the result
        # would not depend on the model.
        layout, token_ids, paths = ThoughtLayout.from_sequences([ids[: max(len(ids) - 1, 1)] for ids in sequences])
        # 2. What is scored: the row before each token predicts it.
        size = layout.M + len(sequences)
        last_keys = torch.arange(layout.M, size, device="cpu").split(1)
        rows, targets, keys, divisors = [], [], [], []
        for i, (ids, path, count) in enumerate(zip(sequences, paths, live.sum(1).tolist(), strict=True)):
            first, end = len(ids) - count, len(ids)
            rows.append(path[first - 1 : end - 1])
            targets.append(ids[first:])
            # A token is the same in two sequences if its row is. A last one without a row gets a key of its own.
            keys.append(torch.cat([path, last_keys[i]])[first:end])
            divisors.append(temperatures[i][first:])
        values, which = torch.cat(divisors).unique(return_inverse=True)
        distinct, slot = (which * size + torch.cat(keys)).unique(return_inverse=True)
        counts = (distinct // size).bincount(minlength=len(values))
        # Tokens with the same slot write the same values.
        row_of, target_of = (torch.zeros_like(distinct).scatter(0, slot, torch.cat(x)) for x in (rows, targets))
        longest = max(map(len, sequences))  # the layout's own bound counts all sequences as one text
        pairs = list(zip(values.tolist(), counts.tolist(), strict=True))
        return cls(layout, token_ids, longest, row_of, target_of, pairs, slot, live)

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """[U,D], the last hidden states that predict the tokens: one forward of a model with attention "quietstar"."""
        layout = self.layout.to(device_of(model))
        embeds = embeddings(model)(self.token_ids.to(layout.device))
        hidden = decode_rows(model, embeds, layout.position_ids(), PackedPass(layout, self.positions))
        return hidden[0, self.rows.to(layout.device)]

    def spread(self, values: Tensor) -> Tensor:
        """Values [U,...] of the tokens as those of each sequence, [B,T,...]; 0 where ``live`` is False."""
        live, slot = self.live.to(values.device), self.slot.to(values.device)
        mask = live.view(*live.shape, *[1] * (values.ndim - 1))
        return values.new_zeros(*live.shape, *values.shape[1:]).masked_scatter(mask, values[slot])


def end_logprobs(
    model: PreTrainedModel, head: LMHead, tokens: EndTokens, return_entropy: bool = False, autocast_head: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies of their predictions, fp32 [B,T] (fp64 from fp64), in nats.

    Both are 0 where ``tokens.live`` is False; without ``return_entropy`` entropies are 0. Differentiable. No logits are kept.

    Args:
        model: with attention "quietstar" or "quietstar_wrapped".
        head: the model's, from ``find_lm_head``.
        autocast_head: whether the head runs in autocast's dtype, where that is on, or in its own.
    """
    divisors, counts = zip(*(tokens.temperatures or [(1.0, 0)]), strict=True)
    targets = tokens.targets.to(device_of(model))

    def score(hidden: Tensor) -> tuple[Tensor, Tensor]:
        own, parts = head.of(model), []
        for divisor, rows, ids in zip(divisors, hidden.split(counts), targets.split(counts), strict=True):
            out = own.apply(linear_logprob, rows, ids, temperature=divisor, return_entropy=return_entropy)
            parts.append(out if isinstance(out, tuple) else (out, torch.zeros_like(out)))
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    hidden = tokens.hidden(model)
    with nullcontext() if autocast_head else torch.autocast(hidden.device.type, enabled=False):
        logprob, entropy = through_head(model, score, hidden)
    return tokens.spread(logprob), tokens.spread(entropy)


def through(
    called: nn.Module, module: nn.Module, answer: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Two real tensors of one shape and dtype that ``answer`` returns, called as the forward of ``module`` by ``called``.

    ``called`` is ``module`` or wraps it. Hooks and wrappers run around the answer: weights are gathered, inputs cast, gradients
    synchronised. A policy of mixed precision would also round what comes out; it doesn't touch complex numbers.
    """
    with answering(module, lambda *args: torch.complex(*answer(*args))):
        both = called(*inputs)
    return both.real, both.imag


def through_head(
    model: PreTrainedModel, answer: Callable[[Tensor], tuple[Tensor, Tensor]], hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """``answer(hidden)`` as the forward of the output layer, which has its whole weight there."""
    layer: Any = model.get_output_embeddings()
    return through(layer, layer, answer, hidden)


@contextmanager
def answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """In this context ``module(*args)`` returns ``answer(*args)``. While it answers, the module has its own forward.

    Keywords are dropped: PEFT's call names all that it hands on.
    """
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # what Accelerate's hooks for offloading call
    own = vars(module).get(name)

    def restore() -> None:
        vars(module).pop(name, None)
        if own is not None:
            setattr(module, name, own)

    def forward(*args: Any, **_: Any) -> Any:
        restore()
        try:
            return answer(*args)
        finally:
            setattr(module, name, forward)

    setattr(module, name, forward)
    try:
        yield
    finally:
        restore()
