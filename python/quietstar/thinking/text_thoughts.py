"""Thoughts that are text between two strings, such as <think> and </think>, and end themselves (RLP, arXiv 2510.01265).

A thought's rows are start string, content, end string and J-1 teacher-forced tokens. Thoughts have unequal lengths, so their
rows stand one after another, without padding to T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config import ThoughtConfig
from quietstar.hf.ends import end_ids
from quietstar.objective import sampled
from quietstar_kernels import ThoughtLayout


class Marks(NamedTuple):
    """Token ids around a thought.

    A thought ends when its last sampled tokens are ``end``, after a token of ``stops``, or after T tokens. ``end`` then stands
    in its rows, whether it was sampled or not; a token of ``stops`` doesn't.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    stops: tuple[int, ...]

    @staticmethod
    def of(config: ThoughtConfig, tokenizer: PreTrainedTokenizerBase | None, model: Any = None) -> Marks | None:
        """None where a thought stands between vectors. Raises ValueError for strings that the tokenizer doesn't know."""
        if not config.written:
            return None
        if tokenizer is None:
            raise ValueError(
                f"thought_start={config.thought_start!r} needs a tokenizer: QuietStar(model, config, tokenizer); "
                "thought_start='' and thought_end='' are for vectors"
            )
        marks = []
        for name in ("thought_start", "thought_end"):
            text = getattr(config, name)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids or tokenizer.unk_token_id in ids:
                raise ValueError(f"{name}={text!r} is not text that the tokenizer has tokens for")
            marks.append(tuple(ids))
        return Marks(marks[0], marks[1], tuple(token for token in end_ids(tokenizer, model) if token not in marks[1]))

    def content(self, thought_ids: Tensor, thought_lengths: Tensor) -> Tensor:
        """int64 [B,P,N], how many of the sampled tokens [B,P,N,T] come before the end."""
        T, E = thought_ids.shape[-1], len(self.end)
        last = (thought_lengths[..., None] - torch.arange(E, 0, -1, device=thought_ids.device)).clamp(0, T - 1)
        ended = (thought_ids.gather(3, last) == thought_ids.new_tensor(self.end)).all(-1) & (thought_lengths >= E)
        stopped = torch.isin(thought_ids.gather(3, last[..., -1:])[..., 0], thought_ids.new_tensor(self.stops))
        return thought_lengths - torch.where(ended, E, torch.where(stopped & (thought_lengths > 0), 1, 0))


@dataclass(frozen=True, eq=False)
class WrittenRows:
    """The rows of some thoughts.

    Attributes:
        layout: packed, with a branch for each thought.
        ids: int64 [B,R], the tokens.
        predicts: int64 [B,P,N,T], the row that predicts each sampled token.
        on: bool [B,P,N,T], which sampled tokens there are.
        ahead: int64 [B,P,N,J], the rows that predict the text after the anchor.
    """

    layout: ThoughtLayout
    ids: Tensor
    thought_ids: Tensor
    predicts: Tensor
    on: Tensor
    ahead: Tensor

    @staticmethod
    def of(layout: ThoughtLayout, input_ids: Tensor, thought_ids: Tensor, marks: Marks, lookahead: int) -> WrittenRows:
        """From a layout whose ``length`` is the number of sampled tokens + J + 1, as in a grid; 0 for a thought that is off."""
        (B, P, N, T), device = thought_ids.shape, thought_ids.device
        there = (layout.length > 0) & (layout.anchor >= 0)[..., None]
        lengths = torch.where(there, layout.length.long() - lookahead - 1, 0)
        content = marks.content(thought_ids, lengths)
        A, E = len(marks.start), len(marks.end)
        rows = torch.where(there, A + content + E + lookahead - 1, 0).flatten(1)
        anchors = layout.anchor[..., None].expand(B, P, N).flatten(1)
        packed = ThoughtLayout.packed(anchors, rows, lo=layout.lo)

        branch, s = packed.branch_of_row().long().clamp(min=0), packed.row_in_branch().long().clamp(min=0)
        before = content.flatten(1).gather(1, branch) + A  # rows before the end string
        start, end = thought_ids.new_tensor(marks.start), thought_ids.new_tensor(marks.end)
        own = thought_ids.flatten(1).gather(1, branch * T + (s - A).clamp(0, T - 1))
        text = input_ids.gather(1, (packed.row_anchor() + 1 + s - before - E).clamp(0, layout.L - 1))
        ids = torch.where(s < before, own, torch.where(s < before + E, end[(s - before).clamp(0, E - 1)], text))
        ids = torch.where(s < A, start[s.clamp(max=A - 1)], ids)

        first = (rows.cumsum(1) - rows).view(B, P, N, 1)
        predicts = first + A - 1 + torch.arange(T, device=device)
        ahead = first + (A + content + E - 1)[..., None] + torch.arange(lookahead, device=device)
        most = max(packed.R - 1, 0)
        return WrittenRows(
            packed, ids, thought_ids, predicts.clamp(max=most), sampled(lengths, T) & there[..., None], ahead.clamp(max=most)
        )
