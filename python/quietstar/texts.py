"""A batch of texts: what enters is checked here, once, and passed on with the layout of its thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from quietstar.checks import check_ids, check_range
from quietstar.config import ThoughtConfig
from quietstar.hf.modules import embeddings
from quietstar.hf.positions import check_positions
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import FLOATS, IGNORED, INTEGERS, MASKS, on_host, refuse_where, shown, tensor


class Column(NamedTuple):
    """What a batch may hold, and an example, which has no B."""

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


@dataclass(frozen=True, eq=False)
class Texts:
    """A batch that was checked, and where it thinks. ``QuietStar.texts`` makes one; its methods take it in place of tensors.

    Attributes:
        input_ids: int64 [B,L].
        attention_mask: [B,L]; None where no text is padded.
        labels: int64 [B,L], -100 on padding and where a token is not to be predicted.
        sequence_ids: int64 [B,L], the first sampling counter of each position.
        layout: of the texts and their thoughts, with the thoughts' lengths as far as they are known.
        anchors: integer [B,P], the positions that think; None for all.
        thought_ids: int64 [B,P,N,T]; None where they are to be sampled.
        thought_lengths: integer [B,P,N]; None where all have T tokens.
        old_logprob: [B,P,N,T], of these thoughts when they were sampled; None where it is the current one.
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

    def tokens(self) -> Tensor:
        """int64 [], how many tokens there are without padding."""
        mask = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        return mask.sum()

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def to(self, device: torch.device, **kwargs: Any) -> Texts:
        """On another device; keyword arguments go to ``Tensor.to``."""
        return self.map(lambda x: x.to(device, **kwargs))

    def map(self, function: Any) -> Texts:
        """With ``function`` of each tensor."""
        layout = replace(self.layout, **{name: function(getattr(self.layout, name)) for name in ("anchor", "lo", "length")})
        found = {name: function(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, layout=layout, **found)

    def at(self, anchors: Tensor) -> Texts:
        """With thoughts at some positions only, int64 [B,P], -1 in unused places; of texts that think at every position."""
        anchors = anchors.to(self.device)
        length = self.layout.length.gather(1, anchors.clamp(min=0)[:, :, None].expand(-1, -1, self.layout.N))
        layout = replace(self.layout, anchor=anchors.int().contiguous(), length=length)
        return replace(self, layout=layout, anchors=anchors)

    def padded(self, places: int) -> Texts:
        """With unused places up to ``places`` anchors a text."""
        assert self.anchors is not None
        more = places - self.layout.P
        anchor, length = pad(self.layout.anchor, (0, more), value=-1), pad(self.layout.length, (0, 0, 0, more))
        layout = replace(self.layout, anchor=anchor, length=length)
        return replace(self, layout=layout, anchors=pad(self.anchors, (0, more), value=-1))

    def with_thoughts(self, thought_ids: Tensor | None, thought_lengths: Tensor | None, lookahead: int) -> Texts:
        """With these thoughts, of ``thought_lengths`` sampled tokens each, in the places that are on."""
        layout = with_lengths(self.layout, thought_lengths, lookahead)
        return replace(self, layout=layout, thought_ids=thought_ids, thought_lengths=thought_lengths)


def with_lengths(layout: ThoughtLayout, thought_lengths: Tensor | None, lookahead: int) -> ThoughtLayout:
    """The layout with ``thought_lengths`` [B,P,N] sampled tokens in each thought that is on; unchanged for None."""
    if thought_lengths is None:
        return layout
    return replace(layout, length=torch.where(layout.length > 0, thought_lengths + lookahead + 1, 0).int().contiguous())


def sampled(thought_lengths: Tensor, thought_tokens: int) -> Tensor:
    """bool [B,P,N,T], True up to each thought's end."""
    return torch.arange(thought_tokens, device=thought_lengths.device) < thought_lengths[..., None]


def check_text(given: Mapping[str, Any], model: PreTrainedModel, config: ThoughtConfig) -> None:
    """Raises ValueError unless these are texts that the model can read.

    Values are checked: on the CPU, which the texts may be on whatever the model is on, by reading them; on a GPU by an
    assertion that nothing waits for.

    Args:
        given: the batch, by the names of ``COLUMNS``; None is a column that is not there. Thoughts are left to
            ``check_thoughts``.
    """
    input_ids, attention_mask = given["input_ids"], given.get("attention_mask")
    sizes: dict[str, int] = {}
    device = input_ids.device if isinstance(input_ids, Tensor) and on_host(input_ids) else embeddings(model).weight.device
    for name in ("input_ids", "attention_mask", "anchors", "document_ids", "labels"):
        if name == "input_ids" or given.get(name) is not None:
            letters, dtypes, _ = COLUMNS[name]
            tensor(name, given[name], letters, sizes, device, dtypes)
            sizes |= zip(letters.split(","), given[name].shape, strict=True)
    assert isinstance(input_ids, Tensor)
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids must hold at least one text of one token, got shape {list(input_ids.shape)}")
    check_ids("input_ids", input_ids, len(embeddings(model).weight))
    for name, token in (("start", config.start_token_id), ("end", config.end_token_id)):
        if token is not None:
            held = input_ids == token if attention_mask is None else (input_ids == token) & (attention_mask != 0)
            refuse_where(held, f"input_ids must not hold the {name}-of-thought id {token}", partial(_place, held))


def make_layout(given: Mapping[str, Any], config: ThoughtConfig) -> ThoughtLayout:
    """The packed sequence of texts that were checked and their thoughts, on the texts' device."""
    input_ids, attention_mask, anchors = given["input_ids"], given.get("attention_mask"), given.get("anchors")
    N, S, document_ids = config.thoughts, config.rows, given.get("document_ids")
    if document_ids is not None:
        if attention_mask is not None:
            document_ids = document_ids.masked_fill(attention_mask == 0, -1)
        return ThoughtLayout.from_documents(document_ids, N, S, anchors=anchors)
    if attention_mask is not None:
        return ThoughtLayout.from_padding(attention_mask, N, S, anchors=anchors)
    if anchors is not None:
        return ThoughtLayout.at(anchors, N, S, text_length=input_ids.shape[1])
    return ThoughtLayout.every_position(input_ids.shape[0], input_ids.shape[1], N, S, device=input_ids.device)


def lay_out(given: Mapping[str, Any], model: PreTrainedModel, config: ThoughtConfig, rows: int) -> ThoughtLayout:
    """``make_layout`` of texts that are checked here; ``rows`` of the longest thought are S or, where it is text, more."""
    check_text(given, model, config)
    layout = make_layout(given, config)
    longest = torch.where(layout.length > 0, layout.length + rows - layout.S, 0)
    check_positions(model, replace(layout, rows=rows, length=longest))
    return layout


def _place(held: Tensor) -> str:
    row, place = held.nonzero()[0].tolist()
    return f", row {row} does at position {place}"


def check_texts(given: Mapping[str, Any], model: PreTrainedModel, config: ThoughtConfig, vocabulary: int, rows: int) -> Texts:
    """The batch without its thoughts; arguments are those of ``lay_out``, with sequence_ids.

    Args:
        vocabulary: V of the output head, for labels.

    Raises:
        ValueError: see ``QuietStar.forward``.
    """
    layout, input_ids, attention_mask = lay_out(given, model, config, rows), given["input_ids"], given.get("attention_mask")
    labels = given.get("labels")
    if labels is None:
        labels = input_ids
    else:
        check_ids("labels", labels.masked_fill(labels == IGNORED, 0), vocabulary)
    labels = labels.long() if attention_mask is None else labels.long().masked_fill(attention_mask == 0, IGNORED)
    sequence_ids = check_sequence_ids(given.get("sequence_ids"), input_ids)
    return Texts(input_ids, attention_mask, labels, sequence_ids, layout, given.get("anchors"))


def check_again(texts: Texts, given: Mapping[str, Any], config: ThoughtConfig) -> Texts:
    """The same batch; raises ValueError for another config, or for columns that its maker should have been given."""
    if others := [name for name, x in given.items() if x is not None]:
        raise ValueError(f"{', '.join(others)}: give it to QuietStar.texts, which made the batch")
    if (texts.layout.N, texts.layout.S) != (config.thoughts, config.rows):
        wanted = f"N={config.thoughts} thoughts of S=T+J+1={config.rows} rows"
        raise ValueError(f"input_ids: texts must have {wanted}, got N={texts.layout.N}, S={texts.layout.S}")
    return texts


def check_sequence_ids(sequence_ids: Tensor | None, input_ids: Tensor) -> Tensor:
    """int64 [B,L]; the row index where none are given."""
    B, L = input_ids.shape
    if sequence_ids is None:
        sequence_ids = torch.arange(B, device=input_ids.device)
    if not isinstance(sequence_ids, Tensor) or tuple(sequence_ids.shape) not in ((B,), (B, L)):
        got = list(sequence_ids.shape) if isinstance(sequence_ids, Tensor) else shown(sequence_ids)
        raise ValueError(f"sequence_ids must have shape [B]=[{B}] or [B,L]=[{B}, {L}], got {got}")
    tensor("sequence_ids", sequence_ids, ",".join("BL"[: sequence_ids.ndim]), {}, input_ids.device, INTEGERS)
    return (sequence_ids[:, None] if sequence_ids.ndim == 1 else sequence_ids).long().expand(B, L)


def check_thoughts(texts: Texts, given: Mapping[str, Any], config: ThoughtConfig, vocabulary: int) -> Texts:
    """The texts with the thoughts of ``given``. Ids past the end of a thought may be anything."""
    layout, T = texts.layout, config.thought_tokens
    sizes = {"B": layout.B, "P": layout.P, "N": layout.N, "T": T}
    thoughts = {name: given[name] for name in ("thought_lengths", "old_logprob", "thought_ids") if given.get(name) is not None}
    for name, x in thoughts.items():
        tensor(name, x, COLUMNS[name].letters, sizes, layout.device, COLUMNS[name].dtypes)
    lengths, ids = thoughts.get("thought_lengths"), thoughts.get("thought_ids")
    if lengths is not None:
        check_range("thought_lengths", lengths, T, "T")
    if ids is not None:
        on = torch.ones_like(ids, dtype=torch.bool) if lengths is None else sampled(lengths, T)
        check_ids("thought_ids", ids.where(on, 0), vocabulary)
        for token in config.banned:
            refuse_where(on & (ids == token), f"thought_ids must not hold the start- or end-of-thought id {token}")
    return replace(texts, layout=with_lengths(layout, lengths, config.lookahead), **thoughts)
