"""Prompts that are read once with all their completions, where that is faster and the results stay the same up to rounding.

Completions are branches on their prompt's last token, in scoring, in training and in sampling. Only models on CPUs take this
path, where it was measured; ``layout_head`` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from quietstar.hf.completions import PackedCompletions
from quietstar.hf.layouts import layout_head, layouts_on
from quietstar.hf.prompts_once import generates_row_by_row, prompts_once

# Scoring shares prompts where rows that repeat them have this many times the tokens, padding included, and this many more.
LEAST_RATIO, LEAST_SAVED = 1.25, 256
# Sampling shares them where this many tokens are not read again for each step of decoding.
LEAST_SAVED_PER_STEP = 16


def may_share(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the model can read equal prompts among these once."""
    return len(set(map(tuple, prompts))) < len(prompts) and _head(model) is not None


def shared_logprob(model: PreTrainedModel, ids: Tensor, mask: Tensor, completion: int) -> Tensor | None:
    """Log-probabilities of completions, fp32 [R,T], from a forward that reads equal prompts once; None if that isn't faster.

    Args:
        ids: int64 [R,L], prompts padded on the left and then T columns of completions padded on the right.
        mask: bool [R,L], where there is a token.
        completion: T.
    """
    prompt = ids.shape[1] - completion
    if not (prompt and completion and ids.device.type == "cpu" and bool(mask[:, :prompt].any(1).all())):
        return None
    one, of_prompt = ids[:, :prompt].masked_fill(~mask[:, :prompt], -1).unique(dim=0, return_inverse=True)
    tokens = int((one >= 0).sum() + mask[:, prompt:].sum())
    saves = len(one) < len(ids) and ids.numel() >= max(LEAST_RATIO * tokens, LEAST_SAVED + tokens)
    if not saves or (head := _head(model)) is None:
        return None

    order = of_prompt.argsort(stable=True)
    packed = PackedCompletions.pack(ids[order], mask[order], completion)
    with layouts_on(model):
        values, _ = packed.logprobs(model, head)
    return values[order.argsort()]


def sharing_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new: int) -> AbstractContextManager[None]:
    """A context for one call of ``generate`` for these rows: it reads equal prompts once, if that is faster."""
    one = set(map(tuple, prompts))
    saved = sum(map(len, prompts)) - sum(map(len, one))
    saves = len(one) < len(prompts) and saved >= LEAST_SAVED_PER_STEP * max_new
    if not saves or not all(prompts) or not generates_row_by_row(model) or (head := _head(model)) is None:
        return nullcontext()
    return prompts_once(model, head, prompts, max_new)


def _head(model: PreTrainedModel) -> Any:
    return layout_head(model) if model.device.type == "cpu" else None
