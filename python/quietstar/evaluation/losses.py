"""What thoughts are worth on held-out texts: the loss with and without greedy thoughts, and the gain with its two parts.

Thoughts to compare a model's own with, at the same places, are another text's, one and the same everywhere, or random tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quietstar import objective
from quietstar.evaluation.intervals import mean_gains
from quietstar.evaluation.scoring import one_thought
from quietstar.hf.modules import dropout_off, largest, sharding_group
from quietstar.model import QuietStar
from quietstar.run.batches import Batch, Example, batches_of, check_data, mix_seed, text_of
from quietstar.run.processes import before_batch
from quietstar.thinking.forward import QuietStarOutput
from quietstar_kernels.checks import flag, instance, integer, items

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
    """Copies of the examples of a batch with its thoughts, on the CPU and without those of padding."""
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
    """The examples of ``with_own_thoughts``, each with the thoughts of the example half the list further on.

    Half the list, since neighbours may be parts of one document. It wraps around, so each example's thoughts are used once.
    Thoughts keep their order and stand at the example's own places; where the other has fewer, they begin again. Places on
    padding, and anchors of -1, neither give nor take a thought.

    Raises:
        ValueError: fewer than two examples that think.
    """
    used = [_used(example).nonzero()[:, 0] for example in examples]
    thinking = [i for i, places in enumerate(used) if len(places)]
    if len(thinking) < 2:
        raise ValueError(f"with_thoughts_of_another: need at least 2 examples with thoughts, got {len(thinking)}")
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


def with_constant_thoughts(examples: Sequence[Example]) -> list[Example]:
    """The examples of ``with_own_thoughts``, with the most frequent of all their thoughts at every place.

    Raises:
        ValueError: there are no examples.
    """
    items("with_constant_thoughts: examples", examples, 1)
    # A thought and its length, if it has one, in one row.
    found = torch.cat([_rows(example) for example in examples])
    thoughts, counts = found.unique(dim=0, return_counts=True)
    most_frequent = thoughts[counts.argmax()]
    T = examples[0]["thought_ids"].shape[-1]
    constant = []
    for example in examples:
        row = most_frequent.expand(len(example["thought_ids"]), -1)
        lengths = {"thought_lengths": row[:, T:]} if "thought_lengths" in example else {}
        constant.append({**example, "thought_ids": row[:, None, :T], **lengths})
    return constant


def with_random_thoughts(examples: Sequence[Example], vocabulary: int, seed: int = 0) -> list[Example]:
    """The examples of ``with_own_thoughts``, with tokens drawn uniformly from the vocabulary; thoughts keep their lengths.

    Args:
        vocabulary: V, the number of tokens.

    Raises:
        ValueError: there are no examples, or the vocabulary is empty.
    """
    items("with_random_thoughts: examples", examples, 1)
    vocabulary = integer("with_random_thoughts: vocabulary", vocabulary, 1)
    found = []
    for number, example in enumerate(examples):
        generator = torch.Generator().manual_seed(mix_seed(seed, number))
        ids = torch.randint(vocabulary, example["thought_ids"].shape, generator=generator)
        found.append({**example, "thought_ids": ids})
    return found


def _rows(example: Example) -> Tensor:
    """int64 [P,T] or, with lengths, [P,T+1]."""
    ids = example["thought_ids"][:, 0]
    return torch.cat([ids, example["thought_lengths"].long()], 1) if "thought_lengths" in example else ids


@dataclass(frozen=True)
class TokenLosses:
    """The loss of each predicted token of some texts, one after another.

    Attributes:
        base, mixed: fp64 [tokens], -log p without a thought and with one greedy thought before the token, nats.
        text: int64 [tokens], the number of the text that it belongs to.
        place: int64 [tokens], the position before it, where the thought is.
        another: fp64 [tokens], -log p with another text's thought at that place; None where this was not measured.
        leaks: bool [tokens], whether that thought has the next four tokens of the text; None where this is not known.
        length: int64 [tokens], its sampled tokens; None where this is not known.
    """

    base: Tensor
    mixed: Tensor
    text: Tensor
    place: Tensor
    another: Tensor | None = None
    leaks: Tensor | None = None
    length: Tensor | None = None


def evaluate(
    qs: QuietStar, examples: Sequence[Example], batch_size: int = 8, progress: bool = False, controls: bool = True
) -> dict[str, float]:
    """Loss of the next token, with one greedy thought before it and without, over the examples' anchors (default: all).

    Args:
        examples: as ``train`` takes them; each counts as one text.
        controls: predict with another text's thoughts, too, which splits the gain into its two parts and takes a second pass
            over the texts. The other text is the one half the list further on, whatever the batches.

    Returns:
        base and mixed, nats: means over texts of a text's mean; gain = base - mixed, and gain_low to gain_high, its 95 %
        interval over texts, each compared with itself; texts and tokens, how many there were. With controls also another, the
        loss with another text's thoughts; mixing = base - another, what any thought gains; content = another - mixed, what the
        own thoughts gain over these; and their intervals, mixing_low, ... gain = mixing + content. What was thought can
        be worth no more than the smaller of gain and content. leak_rate, the share of thoughts that have the next four tokens
        of the text, and gain_without_leaks, the mean gain at the others where both kinds occur; thought_length, their mean.

    Raises:
        ValueError: fewer than two texts with something to predict, which give no interval; other texts in another process
            that shares the weights.
    """
    return summary(token_losses(qs, examples, batch_size, progress, controls))


def summary(losses: TokenLosses) -> dict[str, float]:
    """What ``evaluate`` returns, from the losses of ``token_losses``."""
    texts = len(instance("losses", losses, TokenLosses).text.unique())
    if texts < 2:
        raise ValueError(f"evaluate: examples: an interval needs at least 2 texts with something to predict, got {texts}")
    return figures_of(losses)


def figures_of(losses: TokenLosses) -> dict[str, float]:
    """What ``summary`` returns; of a single text without intervals."""
    tokens = losses.text.bincount()
    tokens, counts = tokens[tokens > 0], tokens > 0
    found = {"base": losses.base, "mixed": losses.mixed} | ({} if losses.another is None else {"another": losses.another})
    means = {name: losses.text.bincount(x)[counts] / tokens for name, x in found.items()}
    figures = {name: float(x.mean()) for name, x in means.items()}
    figures |= {name: value for name, value in mean_gains(**means).items() if value is not None}
    if losses.leaks is not None and losses.length is not None:
        figures |= {"leak_rate": float(losses.leaks.double().mean()), "thought_length": float(losses.length.double().mean())}
        if losses.leaks.any() and not losses.leaks.all():
            figures["gain_without_leaks"] = float((losses.base - losses.mixed)[~losses.leaks].mean())
    return figures | {"tokens": int(tokens.sum())}


def token_losses(
    qs: QuietStar, examples: Sequence[Example], batch_size: int = 8, progress: bool = False, controls: bool = True
) -> TokenLosses:
    """The losses that ``evaluate`` sums up; its arguments. A single text has no other, and is measured without controls."""
    instance("evaluate: qs", qs, QuietStar)
    batch_size = integer("evaluate: batch_size", batch_size, 1)
    check_data("evaluate: examples", examples)
    flag("evaluate: progress", progress)
    flag("evaluate: controls", controls)
    _check_same_in_each_process(qs, examples, batch_size)
    examples = at_chosen_anchors(qs, examples, batch_size)
    losses, own = measure(qs, examples, batch_size, progress, keep=controls)
    if not can_swap(own):
        return losses
    # The thoughts sampled above, so that this costs only a forward.
    others, _ = measure(qs, with_thoughts_of_another(own), batch_size, progress, keep=False)
    return replace(losses, another=others.mixed)


def _check_same_in_each_process(qs: QuietStar, examples: Sequence[Example], batch_size: int) -> None:
    """Processes that gather weights from each other run the model equally often."""
    group, device = sharding_group(qs.model), qs.start_embedding.device
    size = hash((batch_size, *(tuple(_places(x).tolist()) for x in examples))) if group is not None else 0
    if largest(group, size, device) != -largest(group, -size, device):
        raise ValueError(
            "evaluate: examples must be the same in each process where weights are sharded, but there are "
            f"{len(examples)} in this one; with rollout_weights='gathered' they may differ"
        )


@torch.no_grad()
def at_chosen_anchors(qs: QuietStar, examples: Sequence[Example], batch_size: int) -> Sequence[Example]:
    """With the anchors that a config with ``anchor_count`` chooses, always the same; others as they are."""
    if not (qs.thought_config.anchor_count and len(examples)) or not {"anchors", "thought_ids"}.isdisjoint(examples[0]):
        return examples
    found: list[Example] = []
    for chosen, batch in batches_of(examples, batch_size, qs.start_embedding.device):
        anchors = qs.choose_anchors(**text_of(batch), seed=0).cpu()
        found += [{**examples[i], "anchors": anchors[row]} for row, i in enumerate(chosen)]
    return found


def measure(
    qs: QuietStar, examples: Sequence[Example], batch_size: int, progress: bool, keep: bool
) -> tuple[TokenLosses, list[Example]]:
    """The losses of all examples without controls and, to ``keep``, the examples with their thoughts."""
    parts, thinking = [], []
    with torch.no_grad(), dropout_off(qs):
        one = one_thought(qs)  # in evaluation mode, as its weights are
        batches = batches_of(examples, batch_size, qs.start_embedding.device)
        total = -(-len(examples) // batch_size)
        shown = tqdm(batches, desc="held-out texts", total=total, leave=False, disable=not progress)
        for number, (chosen, batch) in enumerate(shown):
            before_batch(number, total)
            base, mixed, anchor, counts, out = _losses(one, batch)
            row, _ = counts.nonzero(as_tuple=True)
            T = anchor.new_full(anchor.shape, one.thought_config.thought_tokens)
            length = T if out.thought_lengths is None else out.thought_lengths[:, :, 0]
            found = (base.double(), mixed.double(), anchor, out.leaks[:, :, 0], length)
            base, mixed, anchor, *others = (x[counts].cpu() for x in found)
            parts.append((base, mixed, chosen.start + row.cpu(), anchor, *others))
            if keep:
                thinking += add_thoughts([examples[i] for i in chosen], out.thought_ids.clamp(min=0), out.thought_lengths)
    if not parts:
        return TokenLosses(*torch.zeros(2, 0).double(), *torch.zeros(2, 0).long()), thinking
    base, mixed, text, place, leaks, length = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenLosses(base, mixed, text, place, leaks=leaks, length=length), thinking


def _losses(one: QuietStar, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, QuietStarOutput]:
    """For the token after each anchor [B,P]: loss without a thought and with one, the anchor, whether the token counts; and
    the whole output."""
    texts = one.texts(**batch)
    # With a seed, since drawing one would advance torch's generator and change the dropout of the run that is evaluated.
    out = one(texts, seed=0)
    counts = objective.make_targets(texts.labels, texts.layout, lookahead=1).mix[:, :, 0, 0] != objective.IGNORED
    anchor = texts.layout.anchor.long()
    base = out.nll_base.gather(1, anchor.clamp(0, texts.layout.L - 2))
    return base, out.nll_mix[:, :, 0, 0], anchor, counts, out
