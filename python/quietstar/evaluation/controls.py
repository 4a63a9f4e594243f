"""Thoughts to compare a model's own with: another text's, at the same places (see ``quietstar.evaluation.gain``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quietstar.evaluation.scoring import one_thought
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.run.batches import Example, batches_of, text_of

__all__ = ["add_thoughts", "can_swap", "with_own_thoughts", "with_thoughts_of_another"]

THOUGHTS = ("thought_ids", "thought_lengths")


@torch.no_grad()
def with_own_thoughts(qs: QuietStar, examples: Sequence[Example], batch_size: int = 8) -> list[Example]:
    """The examples with one greedy thought at each of their anchors (default: all L), for ``token_losses``.

    Returns:
        copies of the examples with thought_ids, int64 [P,1,T], and thought_lengths [P,1] if thoughts may be shorter than T.
    """
    one, found = one_thought(qs), []
    with dropout_off(qs):
        for chosen, batch in batches_of(examples, batch_size, qs.start_embedding.device):
            thoughts = one.think(**text_of(batch), anchors=batch.get("anchors"), seed=0, greedy=True)
            found += add_thoughts([examples[i] for i in chosen], thoughts.thought_ids, thoughts.thought_lengths)
    return found


def add_thoughts(examples: Sequence[Example], thought_ids: Tensor, thought_lengths: Tensor | None) -> list[Example]:
    """Copies of the examples of a batch with its thoughts, on the CPU and without those of padding.

    Args:
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N]; None where all have T.
    """
    given = dict(zip(THOUGHTS, (thought_ids, thought_lengths), strict=True))
    own = {name: x.cpu() for name, x in given.items() if x is not None}
    found = []
    for row, example in enumerate(examples):
        P = len(_places(example))
        found.append({**example, **{name: x[row, :P].clone() for name, x in own.items()}})
    return found


def can_swap(examples: Sequence[Example]) -> bool:
    """Whether two of the examples have a place to think at, so that each can be given the thoughts of another."""
    return sum(bool(_used(example).any()) for example in examples) >= 2


def with_thoughts_of_another(examples: Sequence[Example]) -> list[Example]:
    """The examples of ``with_own_thoughts``, each with the thoughts of the one half of all examples further on.

    Half of them, since neighbours may be parts of one document. It goes round at the end, so each example's thoughts are used
    once. The thoughts come in their order, at the example's own places; where the other has fewer, they begin again. Places
    on padding, and anchors of -1, neither give nor take a thought.

    Raises:
        ValueError: fewer than two examples that think.
    """
    used = [_used(example).nonzero()[:, 0] for example in examples]
    thinking = [i for i, places in enumerate(used) if len(places)]
    if len(thinking) < 2:
        raise ValueError(f"with_thoughts_of_another: examples must be 2 or more that think, got {len(thinking)}")
    found = list(examples)
    half = len(thinking) // 2
    for i, j in zip(thinking, thinking[half:] + thinking[:half], strict=True):
        own, other = examples[i], examples[j]
        taken = used[j][torch.arange(len(used[i])) % len(used[j])]
        swapped = {name: own[name].index_copy(0, used[i], other[name][taken]) for name in THOUGHTS if name in other}
        found[i] = {**own, **swapped}
    return found


def _places(example: Example) -> Tensor:
    """int64 [P], the positions that think, -1 in unused places; on the CPU."""
    return example["anchors"].long().cpu() if "anchors" in example else torch.arange(len(example["input_ids"]))


def _used(example: Example) -> Tensor:
    """bool [P], whether a place is on text; on the CPU."""
    places = _places(example)
    if "attention_mask" not in example:
        return places >= 0
    return (places >= 0) & (example["attention_mask"].cpu() != 0)[places.clamp(min=0)]
