"""What several sequences begin with is read once, where that is faster and the results stay the same up to rounding.

In scoring and in training prompts and completions make a tree. In sampling prompts do, and completions are branches on their
last tokens. Only models on CPUs take this path, where it was measured; ``layout_head`` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from quietstar.group_rl.prompts_once import generates_row_by_row, prompts_once
from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.layouts import layout_head, layouts_on
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import embeddings
from quietstar_kernels import ThoughtLayout

# Scoring shares what rows begin with where rows that repeat it have this many times the tokens, padding included, and this
# many more.
LEAST_RATIO, LEAST_SAVED = 1.25, 256
# Sampling shares prompts where this many tokens are not read again for each step of decoding.
LEAST_SAVED_PER_STEP = 16

Ids = Sequence[Sequence[int]]


def may_share(model: PreTrainedModel, prompts: Ids, completions: Ids) -> bool:
    """Whether to read once what these rows begin with, even if they had no padding."""
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    return all(prompts) and _head(model) is not None and _saves(sum(map(len, rows)), rows)


def shared_states(model: PreTrainedModel, prompts: Ids, completions: Ids, padded: int) -> tuple[LMHead, Tensor, Tensor] | None:
    """The model's states from a forward that reads once what rows begin with; None if that isn't faster.

    Args:
        padded: tokens of a forward that repeats it, padding included.

    Returns:
        The output head; last hidden states [M,D], and which of them, int64 [R,T+1], is that after 0 to T tokens of each
        completion; any after its last.
    """
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    if not all(prompts) or (head := _head(model)) is None or not _saves(padded, rows):
        return None
    layout, ids, places = ThoughtLayout.from_sequences(rows, model.device)
    packed = PackedPass(layout)
    packed.positions = max(map(len, rows))  # less than the layout's bound, which adds up all prompts
    with layouts_on(model):
        states = decode_rows(model, embeddings(model)(ids), layout.position_ids(), packed)[0]
    after = [place[len(prompt) - 1 :] for place, prompt in zip(places, prompts, strict=True)]
    return head, states, pad_sequence(after, batch_first=True)


def sharing_prompts(model: PreTrainedModel, prompts: Ids, max_new: int) -> AbstractContextManager[None]:
    """A context for one call of ``generate`` for these rows: it reads once what they begin with, if that is faster."""
    saves = sum(map(len, prompts)) - _distinct(prompts) >= LEAST_SAVED_PER_STEP * max_new
    if not saves or not all(prompts) or not generates_row_by_row(model) or (head := _head(model)) is None:
        return nullcontext()
    return prompts_once(model, head, prompts, max_new)


def _saves(padded: int, rows: Ids) -> bool:
    tokens = _distinct(rows)
    return padded >= max(LEAST_RATIO * tokens, LEAST_SAVED + tokens)


def _distinct(rows: Ids) -> int:
    """Number of tokens, what several rows begin with counted once."""
    return sum(len(row) - len(commonprefix([before, row])) for before, row in pairwise([[], *sorted(map(list, rows))]))


def _head(model: PreTrainedModel) -> Any:
    return layout_head(model) if model.device.type == "cpu" else None
