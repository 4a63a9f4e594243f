"""Thoughts to compare a model's own with: another text's, at the same places.

What own thoughts gain over these is the gain of their content. What these gain over no thought is the gain of mixing: of the
mixing head and of the extra steps, whatever was thought.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar.evaluation.scoring import one_thought
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.run.batches import Example, batches_of, text_of

__all__ = ["with_own_thoughts", "with_thoughts_of_another"]

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
            own = {name: x.cpu() for name in THOUGHTS if (x := getattr(thoughts, name)) is not None}
            for example, *rows in zip((examples[i] for i in chosen), *own.values(), strict=True):
                P = len(example.get("anchors", example["input_ids"]))
                found.append({**example, **{name: x[:P] for name, x in zip(own, rows, strict=True)}})
    return found


def with_thoughts_of_another(examples: Sequence[Example]) -> list[Example]:
    """The examples of ``with_own_thoughts``, each with the next one's thoughts at the same places.

    Where the next one has fewer places, its thoughts begin again.

    Raises:
        ValueError: fewer than two examples.
    """
    if len(examples) < 2:
        raise ValueError(f"with_thoughts_of_another: examples must be 2 or more, got {len(examples)}")
    found = []
    for own, other in zip(examples, [*examples[1:], examples[0]], strict=True):
        place = torch.arange(len(own["thought_ids"])) % len(other["thought_ids"])
        found.append({**own, **{name: other[name][place] for name in THOUGHTS if name in other}})
    return found
