"""Which of the thoughts sampled at an anchor are kept: those that help most to predict what follows, and don't name it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quietstar.config import option
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.objective import IGNORED, LEAK, following, leaks, sampled
from quietstar.run.batches import Batch
from quietstar.thinking.rollout import Thoughts
from quietstar_kernels.checks import check, check_at_least, check_types


@dataclass
class ThoughtFilter:
    """Which thoughts to keep at each anchor. Anchors where fewer pass are left out, so that all have the same number.

    Raises:
        ValueError: a value is outside its range.
    """

    keep: int = option(0, "K, thoughts to keep at each anchor, those of the highest gain; 0: all, without measuring it")
    min_gain: float = option(
        0.0, "least gain of a kept thought: log-likelihood of the next J tokens less that of the base model, their sum, nats"
    )
    max_length: int | None = option(None, "most sampled tokens of a kept thought; default any number")
    leaks: bool = option(False, f"keep thoughts that hold the text's next {LEAK} tokens too")

    def __post_init__(self) -> None:
        owner = "ThoughtFilter"
        check_types(owner, self)
        check_at_least(owner, self, 0, ("keep",))
        check(owner, self, "max_length", self.max_length is None or self.max_length >= 0, "0 or more")


@torch.no_grad()
def gains(qs: QuietStar, batch: Batch, anchors: Tensor | None, thoughts: Thoughts) -> Tensor:
    """The reward "gain" of each thought about a batch, [B,P,N]."""
    names = ("input_ids", "attention_mask", "labels", "document_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    given = {"anchors": anchors, "thought_ids": thoughts.thought_ids, "thought_lengths": thoughts.thought_lengths}
    with dropout_off(qs):
        config = replace(qs.thought_config, reward="gain", lookahead_discount=1.0, kl_weight=0.0)
        return qs.with_config(config)(**inputs, **given).reward


def best(
    qs: QuietStar, batch: Batch, anchors: Tensor | None, thoughts: Thoughts, wanted: ThoughtFilter
) -> tuple[Tensor, Thoughts, Tensor, Counter[str]]:
    """The thoughts about a batch that pass, K at an anchor, the highest gain first.

    Returns:
        The anchors [B,P] that have them, -1 in unused places; the thoughts [B,P,K,T]; their gains [B,P,K]; and how many
        thoughts were sampled, kept and, by reason, left out.
    """
    mask, J, K = batch["attention_mask"], qs.thought_config.lookahead, wanted.keep
    layout = qs.thinker.layout(batch["input_ids"], mask, anchors, batch.get("document_ids"))
    labels = batch["labels" if "labels" in batch else "input_ids"].masked_fill(mask == 0, IGNORED)
    # Rewarded anchors are followed by J targets and one more token, here of the text itself, whatever the batch is padded to.
    tokens = following(labels, layout, max(J + 1, LEAK))
    gain, lengths = gains(qs, batch, anchors, thoughts), thoughts.lengths

    passed = (layout.anchor[..., None] >= 0) & (layout.length > 0)
    counts = Counter(sampled=int(passed.sum()))
    left_out = {f"followed by fewer than {J + 1} tokens": (tokens[..., : J + 1] == IGNORED).any(-1, keepdim=True)}
    if wanted.max_length is not None:
        left_out[f"longer than {wanted.max_length} tokens"] = lengths > wanted.max_length
    if not wanted.leaks:
        left_out["leaks"] = leaks(thoughts.thought_ids, sampled(lengths, thoughts.thought_ids.shape[-1]), tokens)
    left_out[f"gain below {wanted.min_gain:g}"] = ~(gain >= wanted.min_gain)
    for reason, wrong in left_out.items():
        counts[reason] = int((passed & wrong).sum())
        passed = passed & ~wrong
    enough = passed.sum(-1) >= K
    counts[f"fewer than {K} at the anchor"] = int((passed & ~enough[..., None]).sum())
    counts["kept"] = K * int(enough.sum())
    counts["others at the anchor gain more"] = int((passed & enough[..., None]).sum()) - counts["kept"]

    order = torch.where(passed, gain, -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :K]
    row = torch.arange(len(mask), device=mask.device)[:, None]
    place = enough.int().argsort(dim=1, descending=True, stable=True)  # the kept anchors come first
    index = row[..., None], place[..., None], order[row, place]
    kept = Thoughts(thoughts.thought_ids[index], thoughts.logprob[index], lengths[index])
    return torch.where(enough, layout.anchor.long(), -1)[row, place], kept, gain[index], counts
