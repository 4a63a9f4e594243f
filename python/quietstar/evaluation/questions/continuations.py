"""Prompts of unlike lengths, as token ids, to the texts that a model writes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from quietstar.checks import pad_id
from quietstar.evaluation.questions.answers import cut
from quietstar.model import QuietStar


def batches(texts: Sequence[Sequence[Any]], size: int) -> list[list[int]]:
    """Places of the texts, those of like length together, the longest first: what does not fit in memory shows at once."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def continue_texts(
    qs: QuietStar, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], **options: Any
) -> list[str]:
    """The new text of each prompt, up to the first stop string and without it; ``options`` are those of ``qs.generate``."""
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
