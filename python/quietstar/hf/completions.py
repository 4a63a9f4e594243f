"""Prompts packed once with all their completions, and the log-probabilities of these, without logits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import embeddings
from quietstar_kernels import ThoughtLayout, linear_logprob
from quietstar_kernels.checks import INTEGERS, MASKS, integer, tensor


@dataclass(frozen=True)
class PackedCompletions:
    """Prompts and their completions in one row of tokens, each distinct prompt once. Make it with ``pack``.

    The letters: B completions of at most T tokens, M packed tokens, R scored ones.
    """

    layout: ThoughtLayout  # the prompts are documents of the text, completions are branches. B = 1.
    token_ids: Tensor  # int64 [1,M]. A completion's last token is left out, since nothing follows it.
    rows: Tensor  # int64 [R], which of the M rows predicts each token of the completions
    targets: Tensor  # int64 [R], these tokens
    live: Tensor  # bool [B,T], True for the tokens of the completions; ``targets`` are in its order
    longest: int  # tokens of the longest prompt with its completion

    @classmethod
    def pack(cls, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PackedCompletions:
        """Pack completions in the order given.

        Args:
            input_ids: int32 or int64 [B,L], prompts and then completions of T tokens. Prompts are padded on the left,
                completions on the right. Equal prompts next to each other are packed once.
            attention_mask: bool or integer [B,L], 0 for padding.
            completion_length: T, from 1 to L-1.
        """
        tensor("input_ids", input_ids, "B,L", {}, input_ids.device, INTEGERS)
        B, L = input_ids.shape
        tensor("attention_mask", attention_mask, "B,L", {"B": B, "L": L}, input_ids.device, MASKS)
        T = integer("completion_length", completion_length, 1, L - 1)
        shown, live = (attention_mask != 0).split([L - T, T], 1)
        prompts, completions = input_ids.long().split([L - T, T], 1)
        _check_padding(shown, live)

        one, of_prompt = prompts.masked_fill(~shown, -1).unique_consecutive(dim=0, return_inverse=True)
        lengths, held = (one >= 0).sum(1), live.sum(1)
        last = lengths.cumsum(0) - 1
        anchors, branches = last[of_prompt], (held - 1).clamp(min=0)
        lo = (last + 1 - lengths).repeat_interleave(lengths)
        layout = ThoughtLayout.packed(anchors[None], branches[None], lo=lo[None])

        t = torch.arange(T, device=input_ids.device)
        token_ids = torch.cat([one[one >= 0], completions[t < branches[:, None]]])
        first = layout.L + branches.cumsum(0) - branches
        rows = torch.where(t == 0, anchors[:, None], first[:, None] + t - 1)
        longest = int((lengths[of_prompt] + held).max()) if B else 0
        return cls(layout, token_ids[None], rows[live], completions[live], live, longest)

    def logprobs(
        self,
        model: PreTrainedModel,
        head: LMHead,
        temperature: float = 1.0,
        return_entropy: bool = False,
        autocast_head: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the completions' tokens, fp32 [B,T] (fp64 for fp64 models), and entropies likewise, in nats.

        Both are 0 where ``live`` is False. Differentiable.

        Args:
            model: with attention "quietstar" or "quietstar_wrapped".
            head: the model's, from ``find_lm_head``.
            autocast_head: whether the head runs in autocast's dtype, where that is on, or in its own.
        """
        packed = PackedPass(self.layout)
        packed.positions = self.longest  # less than the layout's bound, which adds up all prompts
        hidden = decode_rows(model, embeddings(model)(self.token_ids), self.layout.position_ids(), packed)
        with nullcontext() if autocast_head else torch.autocast(hidden.device.type, enabled=False):
            rows = hidden[0].index_select(0, self.rows)
            out = head.apply(linear_logprob, rows, self.targets, temperature=temperature, return_entropy=return_entropy)
        logprob, entropy = out if isinstance(out, tuple) else (out, None)
        return self._spread(logprob), None if entropy is None else self._spread(entropy)

    def _spread(self, values: Tensor) -> Tensor:
        """[R] to [B,T]. The result depends on the model even if no token is live."""
        return values.new_zeros(self.live.shape).masked_scatter(self.live, values)


def _check_padding(shown: Tensor, live: Tensor) -> None:
    """Raises ValueError for the masks of prompts [B,L-T] and completions [B,T] if they break a rule."""
    rules = {
        "prompts must be padded on the left alone": (shown[:, 1:] < shown[:, :-1]).any(1),
        "prompts must hold at least one token": ~shown.any(1),
        "completions must be padded on the right alone": (live[:, 1:] > live[:, :-1]).any(1),
    }
    broken = torch.stack(list(rules.values()))
    if bool(broken.any()):
        rule, row = broken.nonzero()[0].tolist()
        raise ValueError(f"attention_mask: {list(rules)[rule]}, broken in row {row}")
