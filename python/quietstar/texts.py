"""Checks a batch of texts, once, and lays out its thoughts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from quietstar import objective
from quietstar.config import ThoughtConfig
from quietstar.hf.modules import embeddings
from quietstar.hf.positions import check_layout, position_limits
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import FLOATS, IGNORED, INTEGERS, MASKS, on_host, refuse_outside, refuse_where, shown, tensor


class Column(NamedTuple):
    """Something that a batch may hold; an example has the same without B."""

    letters: str
    dtypes: tuple[torch.dtype, ...]
    padding: int


COLUMNS = {
    "input_ids": Column("B,L", INTEGERS, 0),
    "attention_mask": Column("B,L", MASKS, 0),
    "labels": Column("B,L", INTEGERS, IGNORED),
    "anchors": Column("B,P", INTEGERS, -1),
    "document_ids": Column("B,L", INTEGERS, -1),
    "thought_ids": Column("B,P,N,T", INTEGERS, 0),
    "thought_lengths": Column("B,P,N", INTEGERS, 0),
    "old_logprob": Column("B,P,N,T", FLOATS, 0),
}


# Of the next tokens, those that a prediction in words may cover.
AHEAD = 32


@dataclass(frozen=True, eq=False)
class RowTable:
    """What the rows of thoughts between vectors hold, besides the vectors.

    Attributes:
        text: int64 [B,P,1,J], a token for padding and the J - 1 after the anchor.
        place: int64 [B,P,N,S], where in [padding, sampled tokens, text] each row's token stands; None where all stand in
            their places, as far as the CPU knows.
        is_start: bool [S,1], the start row.
        is_end: bool [B,P,N,S,1], the end row.
    """

    text: Tensor
    place: Tensor | None
    is_start: Tensor
    is_end: Tensor

    @staticmethod
    def of(layout: ThoughtLayout, input_ids: Tensor, lookahead: int, pad_id: int) -> RowTable:
        ahead = objective.places_ahead(layout, lookahead, layout.L + lookahead)
        anchored = (layout.anchor >= 0)[:, :, None]
        there = (ahead < layout.L) & anchored & (torch.arange(lookahead, device=layout.device) > 0)
        text = input_ids.long().gather(1, ahead.clamp(max=layout.L - 1).flatten(1)).view(ahead.shape)
        end = (layout.length.long() - lookahead).clamp(min=1)[..., None]
        s = torch.arange(layout.S, device=layout.device)
        # A shorter thought leaves out its last sampled tokens.
        place = torch.where(s < end, s, (s + layout.S - lookahead - end).clamp(max=layout.S - 1))
        place = torch.where(anchored[..., None], place, 0)
        known = on_host(place) and not torch.compiler.is_compiling() and bool((place == s).all())
        text = torch.where(there, text, pad_id)[:, :, None]
        return RowTable(text, None if known else place, (s == 0)[:, None], (s == end)[..., None])

    def select(self, anchors: slice) -> RowTable:
        """That of some of the anchors."""
        place = None if self.place is None else self.place[:, anchors]
        return RowTable(self.text[:, anchors], place, self.is_start, self.is_end[:, anchors])


@dataclass(frozen=True, eq=False)
class Tables:
    """What a pass reads that no model changes: of some texts, where they think, how long and what the config predicts.

    Attributes:
        config: what they were made for.
        targets: of the objective.
        predicted: int64 [B*(L-1) + B*P*N*J], the base and the mixed targets.
        counts, divisors: of the batch's targets, and what its own means are divided by.
        following: int64 [B,P,32], the labels after each anchor that is rewarded, -100 elsewhere.
        places: int64 [B,P,J], the text positions that predict the mixed targets.
        scored: int64 [B,P,J], the same among base targets.
        text: int64 [B,1,1], the number of each text.
        rows: None where thoughts are text.
    """

    config: ThoughtConfig
    targets: objective.Targets
    predicted: Tensor
    counts: objective.Counts
    divisors: objective.Counts
    following: Tensor
    places: Tensor
    scored: Tensor
    text: Tensor
    rows: RowTable | None

    @staticmethod
    def of(layout: ThoughtLayout, input_ids: Tensor, labels: Tensor, config: ThoughtConfig, pad_id: int) -> Tables:
        J, L = config.lookahead, layout.L
        targets = objective.make_targets(labels, layout, J, all_known=config.mixing == "none")
        counts = objective.count(targets)
        layout.position_ids()  # is kept there
        return Tables(
            config,
            targets,
            torch.cat([targets.base.flatten(), targets.mix.flatten()]),
            counts,
            counts.divisors(),
            objective.following(labels, layout, AHEAD).where(targets.rewarded[..., None], IGNORED),
            objective.places_ahead(layout, J, L),
            objective.places_ahead(layout, J, L - 1),
            torch.arange(layout.B, device=layout.device)[:, None, None],
            None if config.written else RowTable.of(layout, input_ids, J, pad_id),
        )

    def select(self, anchors: slice) -> Tables:
        """What the predictions of some of the anchors read; ``predicted`` and the counts are still of all."""
        parts = {name: getattr(self, name)[:, anchors] for name in ("following", "places", "scored")}
        rows = None if self.rows is None else self.rows.select(anchors)
        return replace(self, targets=self.targets.select(anchors), rows=rows, **parts)

    def without(self, left_out: Tensor) -> Tables:
        """The same; the anchors of ``left_out`` bool [B,P] predict nothing."""
        mix = self.targets.mix.masked_fill(left_out[..., None, None], IGNORED)
        predicted = torch.cat([self.targets.base.flatten(), mix.flatten()])
        return replace(self, targets=replace(self.targets, mix=mix), predicted=predicted)


@dataclass(frozen=True, eq=False)
class Texts:
    """A batch that was checked, and where it thinks. ``QuietStar.texts`` makes one; its other methods take it for tensors.

    Attributes:
        input_ids: int64 [B,L].
        attention_mask: [B,L]; None where no text is padded.
        labels: int64 [B,L], -100 on padding and where a token is not to be predicted.
        sequence_ids: int64 [B,L], which text each position belongs to, for sampling.
        layout: of the texts and their thoughts, with the thoughts' lengths as far as they are known.
        anchors: integer [B,P], the positions that think; None for all.
        thought_ids: int64 [B,P,N,T]; None where they are to be sampled.
        thought_lengths: integer [B,P,N]; None where all have T tokens.
        old_logprob: [B,P,N,T], of these thoughts when they were sampled; None where it is the current one.
        tables: None until the anchors are known.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    sequence_ids: Tensor
    layout: ThoughtLayout
    anchors: Tensor | None = None
    thought_ids: Tensor | None = None
    thought_lengths: Tensor | None = None
    old_logprob: Tensor | None = None
    tables: Tables | None = None

    def tokens(self) -> Tensor:
        """int64 [], how many tokens there are without padding."""
        return (torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask).sum()

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError unless the texts are on the model's ``device``."""
        if self.device != device:
            raise ValueError(f"input_ids must be on {device} like the model's embeddings, got {self.device}")

    def to(self, device: torch.device, **options: Any) -> Texts:
        """On another device; ``options`` go to ``Tensor.to``."""
        return self.map(lambda x: x.to(device, **options))

    def map(self, function: Callable[[Tensor], Tensor]) -> Texts:
        """With ``function``, which copies tensors to another place, of all tensors; from the CPU of all of a dtype at once."""
        if not on_host(self.input_ids):
            return _mapped(self, function)
        found: dict[int, Tensor] = {}
        _mapped(self, lambda x: found.setdefault(id(x), x))
        moved: dict[int, Tensor] = {}
        for dtype in {x.dtype for x in found.values()}:
            own = {name: x for name, x in found.items() if x.dtype == dtype}
            padded = [pad(x.flatten(), (0, -x.numel() % ALIGNED)) for x in own.values()]
            parts = function(torch.cat(padded)).split([len(x) for x in padded])
            moved |= {name: part[: x.numel()].view(x.shape) for (name, x), part in zip(own.items(), parts, strict=True)}
        return _mapped(self, lambda x: moved[id(x)])

    def with_anchors(self, anchors: Tensor) -> Texts:
        """With thoughts at some positions only, int64 [B,P], -1 in unused places; of texts that think at every position."""
        anchors = anchors.to(self.device)
        length = self.layout.length.gather(1, anchors.clamp(min=0)[:, :, None].expand(-1, -1, self.layout.N))
        length = length.masked_fill(anchors[..., None] < 0, self.layout.S)  # unused places: their anchor turns them off
        layout = replace(self.layout, anchor=anchors.int().contiguous(), length=length)
        return replace(self, layout=layout, anchors=anchors, tables=None)

    def with_unused_anchors(self, places: int) -> Texts:
        """With unused places up to ``places`` anchors a text."""
        assert self.anchors is not None
        more = places - self.layout.P
        anchor = pad(self.layout.anchor, (0, more), value=-1)
        layout = replace(self.layout, anchor=anchor, length=pad(self.layout.length, (0, 0, 0, more), value=self.layout.S))
        return replace(self, layout=layout, anchors=pad(self.anchors, (0, more), value=-1), tables=None)

    def with_thoughts(
        self, config: ThoughtConfig, thought_ids: Tensor | None, lengths: Tensor | None, old_logprob: Tensor | None = None
    ) -> Texts:
        """With these thoughts at its anchors."""
        thoughts: dict[str, Any] = {"thought_ids": thought_ids, "thought_lengths": lengths, "old_logprob": old_logprob}
        for name, x in thoughts.items():
            if x is not None and x.shape[1] != self.layout.P:  # of chosen anchors, which nobody knew before
                raise ValueError(f"{name} must have thoughts at P={self.layout.P} anchors of a text, got {x.shape[1]}")
        layout = with_lengths(self.layout, lengths, config.lookahead)
        return replace(self, layout=layout, tables=self.tables if layout is self.layout else None, **thoughts)

    def with_tables(self, config: ThoughtConfig, pad_id: int) -> Texts:
        """With the tables of a config whose number of rows is the layout's."""
        if self.tables is not None and self.tables.config == config:
            return self
        with torch.inference_mode(False):  # a backward may save them
            return replace(self, tables=Tables.of(self.layout, self.input_ids, self.labels, config, pad_id))

    def check_unchanged(self, config: ThoughtConfig, given: Mapping[str, Any]) -> Texts:
        """The same; raises ValueError for another config, or for columns that its maker should have been given."""
        if others := [name for name, x in given.items() if x is not None]:
            raise ValueError(f"{', '.join(others)}: give it to QuietStar.texts, which made the batch")
        if (self.layout.N, self.layout.S) != (config.thoughts, config.rows):
            wanted = f"N={config.thoughts} thoughts of S=T+J+1={config.rows} rows"
            raise ValueError(f"input_ids: texts must have {wanted}, got N={self.layout.N}, S={self.layout.S}")
        return self


ALIGNED = 16  # elements: kernels read aligned tensors faster


def _mapped(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass, and those in it, with ``function`` of each tensor."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, ThoughtLayout):
        return x.map(function)
    if not is_dataclass(x) or isinstance(x, ThoughtConfig):
        return x
    return replace(x, **{field.name: _mapped(getattr(x, field.name), function) for field in fields(x)})  # type: ignore[type-var]


def with_lengths(layout: ThoughtLayout, thought_lengths: Tensor | None, lookahead: int) -> ThoughtLayout:
    """The layout with ``thought_lengths`` [B,P,N] sampled tokens in each thought that is on; unchanged for None."""
    if thought_lengths is None:
        return layout
    return replace(layout, length=torch.where(layout.length > 0, thought_lengths + lookahead + 1, 0).int().contiguous())


def check_texts(
    given: Mapping[str, Any],
    model: PreTrainedModel,
    config: ThoughtConfig,
    rows: int,
    vocabulary: int | None = None,
    chooses: bool = False,
) -> Texts:
    """Checks all columns. The result has the layout, but no thoughts yet.

    Values are checked on the CPU, which the columns may be on whatever the model is on, by reading them; on a GPU by an
    assertion that nothing waits for.

    Args:
        given: by the names of ``COLUMNS``, and sequence_ids; None is a column that is not there.
        rows: of the longest thought: S or, where thoughts are text, more.
        vocabulary: V of the output head; default that of the embeddings.
        chooses: whether anchors are chosen later, so that P is not known.

    Raises:
        ValueError: see ``QuietStar.forward``.
    """
    given = {name: x for name, x in given.items() if x is not None or name == "input_ids"}
    check_columns(given, model, config, vocabulary, chooses)
    input_ids, mask, sequence_ids = given["input_ids"], given.get("attention_mask"), given.get("sequence_ids")
    layout = make_layout(given, config)
    # Thoughts that are text may take more rows than those between vectors.
    longest = torch.where(layout.length > 0, layout.length + rows - layout.S, 0)
    check_layout(type(model).__name__, position_limits(model), replace(layout, rows=rows, length=longest))
    labels = given.get("labels", input_ids).long()
    labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    if sequence_ids is None:
        sequence_ids = torch.arange(layout.B, device=input_ids.device)
    sequence_ids = (sequence_ids[:, None] if sequence_ids.ndim == 1 else sequence_ids).long().expand(input_ids.shape)
    return Texts(input_ids, mask, labels, sequence_ids, layout, given.get("anchors"))


def check_columns(
    given: Mapping[str, Any],
    model: PreTrainedModel,
    config: ThoughtConfig,
    vocabulary: int | None = None,
    chooses: bool = False,
) -> None:
    """The checks of ``check_texts``; ``given`` has no None."""
    input_ids, V, T = given["input_ids"], len(embeddings(model).weight), config.thought_tokens

    # 1. Types, shapes and devices.
    device = input_ids.device if isinstance(input_ids, Tensor) and on_host(input_ids) else embeddings(model).weight.device
    sizes = {"N": config.thoughts, "T": T}
    for name in [name for name in COLUMNS if name in given]:
        letters, dtypes, _ = COLUMNS[name]
        tensor(name, given[name], letters, sizes, device, dtypes)
        sizes |= zip(letters.split(","), given[name].shape, strict=True)
        if name == "input_ids" and "anchors" not in given and not chooses:
            sizes["P"] = sizes["L"]
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids must hold at least one text of one token, got shape {list(input_ids.shape)}")
    if "sequence_ids" in given:
        ids, (B, L) = given["sequence_ids"], input_ids.shape
        if not isinstance(ids, Tensor) or tuple(ids.shape) not in ((B,), (B, L)):
            got = list(ids.shape) if isinstance(ids, Tensor) else shown(ids)
            raise ValueError(f"sequence_ids must have shape [B]=[{B}] or [B,L]=[{B}, {L}], got {got}")
        tensor("sequence_ids", ids, "...", {}, device, INTEGERS)

    # 2. Texts.
    refuse_outside("input_ids", input_ids, V - 1, "V-1")
    mask, labels, lengths, thought_ids = (
        given.get(name) for name in ("attention_mask", "labels", "thought_lengths", "thought_ids")
    )
    for name, token in (("start", config.start_token_id), ("end", config.end_token_id)):
        if token is not None:
            held = input_ids == token if mask is None else (input_ids == token) & (mask != 0)
            refuse_where(held, f"input_ids must not hold the {name}-of-thought id {token}", partial(_place, held))
    if labels is not None:
        refuse_outside("labels", labels.masked_fill(labels == IGNORED, 0), (vocabulary or V) - 1, "V-1")

    # 3. Thoughts, whose ids past their end may be anything.
    if lengths is not None:
        refuse_outside("thought_lengths", lengths, T, "T")
    if thought_ids is not None:
        on = torch.ones_like(thought_ids, dtype=torch.bool) if lengths is None else objective.sampled(lengths, T)
        refuse_outside("thought_ids", thought_ids.where(on, 0), (vocabulary or V) - 1, "V-1")
        for token in config.banned:
            refuse_where(on & (thought_ids == token), f"thought_ids must not hold the start- or end-of-thought id {token}")


def _place(held: Tensor) -> str:
    row, place = held.nonzero()[0].tolist()
    return f", row {row} does at position {place}"


def make_layout(given: Mapping[str, Any], config: ThoughtConfig) -> ThoughtLayout:
    """The packed sequence of texts that were checked and their thoughts, on the texts' device."""
    input_ids, mask, anchors = given["input_ids"], given.get("attention_mask"), given.get("anchors")
    (B, L), N, S, document_ids = input_ids.shape, config.thoughts, config.rows, given.get("document_ids")
    if document_ids is not None:
        document_ids = document_ids if mask is None else document_ids.masked_fill(mask == 0, -1)
        return ThoughtLayout.from_documents(document_ids, N, S, anchors=anchors)
    if mask is not None:
        return ThoughtLayout.from_padding(mask, N, S, anchors=anchors)
    if anchors is not None:
        return ThoughtLayout.at(anchors, N, S, text_length=L)
    return ThoughtLayout.every_position(B, L, N, S, device=input_ids.device)
