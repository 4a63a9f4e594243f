"""What thoughts are worth on held-out texts: the loss with and without greedy thoughts, and the gain with its two parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quietstar import checks, objective
from quietstar.arguments.values import flag, instance, integer
from quietstar.evaluation.controls import add_thoughts, can_swap, with_thoughts_of_another
from quietstar.evaluation.gain import mean_gains
from quietstar.evaluation.scoring import one_thought
from quietstar.hf.modules import dropout_off
from quietstar.model import QuietStar
from quietstar.output import QuietStarOutput
from quietstar.run.batches import Batch, Example, batches_of, check_data

__all__ = ["TokenLosses", "evaluate", "summary", "token_losses"]


@dataclass(frozen=True)
class TokenLosses:
    """The loss of each predicted token of some texts, one after another.

    Attributes:
        base, mixed: fp64 [tokens], -log p without a thought and with one greedy thought before the token, nats.
        text: int64 [tokens], the number of the text that it belongs to.
        place: int64 [tokens], the position before it, where the thought is.
        another: fp64 [tokens], -log p with another text's thought at that place; None where this was not measured.
    """

    base: Tensor
    mixed: Tensor
    text: Tensor
    place: Tensor
    another: Tensor | None = None


def evaluate(
    qs: QuietStar, examples: Sequence[Example], batch_size: int = 8, progress: bool = False, controls: bool = True
) -> dict[str, float]:
    """Loss of the next token, with one greedy thought before it and without, over the examples' anchors (default: all).

    Args:
        examples: as ``train`` takes them; each counts as one text.
        controls: predict with another text's thoughts, too, which splits the gain into its two parts and takes a second pass
            over the texts. The other text is the one half of all texts further on, whatever the batches.

    Returns:
        base and mixed, nats: means over texts of a text's mean; gain = base - mixed, and gain_low to gain_high, its 95 %
        interval over texts, each compared with itself; texts and tokens, how many there were. With controls also another, the
        loss with another text's thoughts; mixing = base - another, what any thought gains; content = another - mixed, what the
        own thoughts gain over these; and their intervals, mixing_low, ... gain = mixing + content, and only content is due to
        what was thought.

    Raises:
        ValueError: fewer than two texts with something to predict, which give no interval.
    """
    return summary(token_losses(qs, examples, batch_size, progress, controls))


def summary(losses: TokenLosses) -> dict[str, float]:
    """What ``evaluate`` returns, from the losses of ``token_losses``."""
    tokens = instance("losses", losses, TokenLosses).text.bincount()
    tokens, counts = tokens[tokens > 0], tokens > 0
    if len(tokens) < 2:
        raise ValueError(f"evaluate: examples: an interval needs at least 2 texts with something to predict, got {len(tokens)}")
    found = {"base": losses.base, "mixed": losses.mixed} | ({} if losses.another is None else {"another": losses.another})
    means = {name: losses.text.bincount(x)[counts] / tokens for name, x in found.items()}
    figures: dict[str, float] = {name: float(x.mean()) for name, x in means.items()}
    for name, value in mean_gains(**means).items():
        assert value is not None  # there are two texts or more
        figures[name] = value
    return figures | {"texts": len(tokens), "tokens": int(tokens.sum())}


def token_losses(
    qs: QuietStar, examples: Sequence[Example], batch_size: int = 8, progress: bool = False, controls: bool = True
) -> TokenLosses:
    """The losses that ``evaluate`` sums up; its arguments. A single text has no other, and is measured without controls."""
    instance("evaluate: qs", qs, QuietStar)
    batch_size = integer("evaluate: batch_size", batch_size, 1)
    check_data("evaluate: examples", examples)
    flag("evaluate: progress", progress)
    flag("evaluate: controls", controls)
    losses, own = measure(qs, examples, batch_size, progress, keep=controls)
    if not can_swap(own):
        return losses
    # The thoughts sampled above, so that this costs a forward alone.
    others, _ = measure(qs, with_thoughts_of_another(own), batch_size, progress, keep=False)
    return replace(losses, another=others.mixed)


def measure(
    qs: QuietStar, examples: Sequence[Example], batch_size: int, progress: bool, keep: bool
) -> tuple[TokenLosses, list[Example]]:
    """The losses of all examples without controls and, to ``keep``, the examples with their thoughts."""
    parts, thinking = [], []
    with torch.no_grad(), dropout_off(qs):
        batches = batches_of(examples, batch_size, qs.start_embedding.device)
        total = -(-len(examples) // batch_size)
        for chosen, batch in tqdm(batches, desc="held-out texts", total=total, leave=False, disable=not progress):
            base, mixed, anchor, counts, out = _losses(one_thought(qs), batch)
            row, _ = counts.nonzero(as_tuple=True)
            parts.append(
                (base[counts].double().cpu(), mixed[counts].double().cpu(), chosen.start + row.cpu(), anchor[counts].cpu())
            )
            if keep:
                thinking += add_thoughts([examples[i] for i in chosen], out.thought_ids.clamp(min=0), out.thought_lengths)
    if not parts:
        return TokenLosses(*torch.zeros(2, 0).double(), *torch.zeros(2, 0).long()), thinking
    return TokenLosses(*(torch.cat(column) for column in zip(*parts, strict=True))), thinking


def _losses(one: QuietStar, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, QuietStarOutput]:
    """For the token after each anchor [B,P]: loss without a thought and with one, the anchor, whether the token counts; and
    the whole output."""
    # With a seed, since drawing one would advance torch's generator and change the dropout of the run that is evaluated.
    out = one(**batch, seed=0)
    input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
    layout = one.thinker.layout(input_ids, attention_mask, batch.get("anchors"), batch.get("document_ids"))
    labels = checks.check_labels(batch.get("labels"), input_ids, one.lm_head.linear.out_features)
    counts = objective.make_targets(labels, attention_mask, layout, lookahead=1).mix[:, :, 0, 0] != objective.IGNORED
    anchor = layout.anchor.long()
    base = out.nll_base.gather(1, anchor.clamp(0, input_ids.shape[1] - 2))
    return base, out.nll_mix[:, :, 0, 0], anchor, counts, out
