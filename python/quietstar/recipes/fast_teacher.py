"""What the thinking model of Fast Quiet-STaR predicts at each token, for the plain model to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quietstar import QuietStar
from quietstar.evaluation.scoring import one_thought
from quietstar.run.batches import Example, collate

ROWS = 2**13  # thought rows of a packed forward at a time


@torch.no_grad()
def next_token_logprobs(teacher: QuietStar, texts: Sequence[Example]) -> Tensor:
    """Log-probabilities fp32 [tokens,V] of the token after each greedy thought: one thought before each target.

    They are mixed and normalised, as in generation. Made for one batch at a time, so that nothing needs room for all texts.
    """
    one = one_thought(teacher)
    ids, mask, on = padded(texts, teacher.start_embedding.device)
    anchors = pad_sequence([row.nonzero()[:, 0] for row in on], True, -1)
    parts = []
    for some in anchors.split(max(1, ROWS // (len(texts) * one.thought_config.rows)), 1):
        thoughts = one.think(ids, mask, anchors=some, seed=0, greedy=True)
        layout = one.thinker.layout(ids, mask, some, thought_lengths=thoughts.thought_lengths)
        text, thought = one.thinker.states(layout, ids, thoughts.thought_ids)
        parts.append(one.thinker.end_states(thought, thoughts.thought_lengths)[:, :, 0, 0])
    h_thought = torch.cat(parts, 1)[anchors >= 0]
    return one.thinker.mixed_logprobs(text[:, :-1][on], h_thought).float().log_softmax(-1)


def padded(texts: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and attention mask, int64 [B,L], and where the next token is a target, bool [B,L-1]."""
    rows = [{"input_ids": x["input_ids"], "attention_mask": _mask(x)} for x in texts]
    (batch,) = collate(rows, list(range(len(rows))), 1)
    on = pad_sequence([target_mask(text) for text in texts], True, False)
    return batch["input_ids"].to(device), batch["attention_mask"].to(device), on.to(device)


def target_mask(text: Example) -> Tensor:
    """bool [L-1], the positions whose next token is a target, as in training with thoughts."""
    ids = text["input_ids"]
    on = (text.get("labels", ids)[1:] != -100) & (_mask(text)[1:] != 0)
    if "anchors" in text:
        thinks = torch.zeros(len(ids), dtype=torch.bool)
        thinks[text["anchors"][text["anchors"] >= 0].long()] = True
        on &= thinks[:-1]
    return on


def _mask(text: Example) -> Tensor:
    return text.get("attention_mask", torch.ones_like(text["input_ids"]))
