"""Predictions that thoughts write down, compared with how the text goes on (RPT, arXiv 2506.08007, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar_kernels.checks import IGNORED

# How many of the next tokens a prediction may cover.
AHEAD = 32
BOX = "\\boxed{"


def matches(
    thought_ids: Tensor,
    thought_lengths: Tensor,
    previous: Tensor,
    following: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tensor:
    r"""bool [B,P,N]: whether a thought's prediction is how the text goes on.

    The prediction is what the thought's last ``\boxed{}`` holds; its bytes must be those of the next token, or of the next
    few. Without a tokenizer it is the thought's last token, which must be the next one.

    Args:
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N].
        previous: int64 [B,P], the tokens at the anchors.
        following: int64 [B,P,F], the tokens after them, -100 where there is none.
    """
    if tokenizer is None:
        last = thought_ids.gather(3, (thought_lengths - 1).clamp(min=0)[..., None])[..., 0]
        return (thought_lengths > 0) & (last == following[:, :, :1])
    found = torch.zeros_like(thought_lengths, dtype=torch.bool)
    ids, lengths, before, after = (x.tolist() for x in (thought_ids, thought_lengths, previous, following))
    B, P, N = found.shape
    for b in range(B):
        for p in range(P):
            if after[b][p][0] == IGNORED:
                continue
            thoughts = [str(tokenizer.decode(ids[b][p][n][: lengths[b][p][n]])) for n in range(N)]
            predictions = [boxed(thought) for thought in thoughts]
            if any(predictions):
                right = _continuations(before[b][p], after[b][p], tokenizer)
                for n, prediction in enumerate(predictions):
                    found[b, p, n] = prediction in right
    return found


def boxed(text: str) -> str:
    r"""What the last ``\boxed{}`` of a text holds; empty without one, or where its brace isn't closed."""
    _, _, rest = text.rpartition(BOX) if BOX in text else ("", "", "")
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:i]
    return ""


def _continuations(previous: int, following: list[int], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The text of the next token, of the next two, ...; after the previous one, since some decoders drop a first space."""
    start = len(tokenizer.decode([previous]))
    known = following[: following.index(IGNORED)] if IGNORED in following else following
    return {str(tokenizer.decode([previous, *known[: i + 1]]))[start:] for i in range(len(known))} - {""}
