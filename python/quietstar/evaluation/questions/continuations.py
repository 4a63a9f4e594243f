"""Continuations of prompts of different lengths: batches of similar lengths, padding, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from quietstar.checks import pad_id
from quietstar.evaluation.questions.answers import cut
from quietstar.model import QuietStar


def batches_by_length(texts: Sequence[Sequence[Any]], size: int) -> list[list[int]]:
    """Indices of texts of similar length, the longest first, so that running out of memory shows at once."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def continue_texts(
    qs: QuietStar, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], **options: Any
) -> list[str]:
    """The new text after each prompt, before the first stop string; ``options`` are those of ``qs.generate``."""
    tokenizer = cast(Any, qs.tokenizer)
    pad, L = pad_id(qs.config), max(map(len, prompts))
    ids = [[pad] * (L - len(row)) + list(row) for row in prompts]
    mask = [[0] * (L - len(row)) + [1] * len(row) for row in prompts]
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    device = qs.start_embedding.device
    out = qs.generate(
        torch.tensor(ids, device=device),
        torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **options,
    )
    return [cut(tokenizer.decode(row, skip_special_tokens=True), stop) for row in out[:, L:].tolist()]
