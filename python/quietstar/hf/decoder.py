"""Forwards of the decoder over rows of text and thoughts, and what they do where rows are mixed.

transformers carries a pass to attention and to recurrent layers as the keyword ``thought_layout``. Calls are counted instead of
reading a layer index, because a model may make more than one in a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.hf.architectures import convolutions
from quietstar.hf.merged_weights import Merged, groups_of, merge
from quietstar.hf.modules import backbone
from quietstar_kernels import (
    DeltaRows,
    ThoughtLayout,
    advance_states,
    anchor_states,
    conv_tails,
    rotary,
    rotary_decode,
    text_states,
    thought_attention,
    thought_conv,
    thought_conv_decode,
    thought_decode,
    thought_delta,
    thought_delta_decode,
)


class ThoughtPass:
    """Computes what mixes rows in one forward: calls of attention, and of the convolutions and recurrences of hybrid models.

    Attributes:
        positions: a bound on position ids: all are smaller.
        stored: what an earlier forward left for each call; None for passes that need nothing.
        calls: how many there were.
        convolutions: how many of them were convolutions.
        merged: copies of weights for products side by side; None where there are none.
    """

    def __init__(self, positions: int, stored: Sized | None = None, merged: Merged | None = None):
        self.positions, self.stored, self.calls, self.convolutions = positions, stored, 0, 0
        self.merged = merged

    def angles(self, frequencies: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B,rows,K] of the frequencies, fp32 [K], times ``position_ids`` [B,rows]."""
        turned = position_ids[..., None] * frequencies
        return turned.cos(), turned.sin()

    def rotate(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values for ``attend``, from what ``rotary`` takes; keys and values None where they are written."""
        return rotary(*inputs, **options)

    def attend(self, q: Tensor, k: Any, v: Any, **options: Any) -> Tensor:
        """q [B,H,rows,K], k [B,G,rows,K], v [B,G,rows,E] to [B,H,rows,E]; options of ``thought_attention``.

        k and v may be None, as ``rotate`` gave them.
        """
        raise NotImplementedError

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [B,rows,D], weight [D,W] and bias [D] to [B,rows,D], as ``thought_conv``."""
        raise NotImplementedError

    def recur(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
        """Arguments and result [B,H,rows,E] of ``thought_delta``."""
        raise NotImplementedError


class PackedPass(ThoughtPass):
    """The differentiable pass: text and all thought rows at once."""

    def __init__(self, layout: ThoughtLayout, positions: int | None = None):
        super().__init__(layout.L + layout.S if positions is None else positions)
        self.layout = layout

    def keep(self, *rows: Tensor, width: int | None = None) -> None:
        """Called with what the rows of a call leave for later ones: k and v; the fields of ``DeltaRows``; or x [B,1,rows,D] and
        the ``width`` of a convolution."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.keep(k, v)
        self.calls += 1
        return thought_attention(q, k, v, self.layout, **options)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.keep(x[:, None], width=weight.shape[1])
        self.calls += 1
        return thought_conv(x, weight, bias, self.layout)

    def recur(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
        out, w = thought_delta(q, k, v, g, beta, self.layout)
        self.keep(k, w, g)
        self.calls += 1
        return out


class LeafPass(PackedPass):
    """Only the text, differentiable. ``rows`` holds what its rows leave for later ones, for each call of the forward."""

    def __init__(self, layout: ThoughtLayout):
        super().__init__(layout.text_only(), layout.L)
        self.done = False
        self.with_gradients = True
        self.rows: list[tuple[Tensor, ...]] = []

    def keep(self, *rows: Tensor, width: int | None = None) -> None:
        if not self.done:  # checkpointed layers call again in the backward
            self.rows.append(rows)
            self.with_gradients &= torch.is_grad_enabled()


class ChunkPass(ThoughtPass):
    """All thought rows of some anchors, differentiable, over the ``rows`` of an earlier ``LeafPass``."""

    def __init__(self, layout: ThoughtLayout, text: list[tuple[Tensor, ...]]):
        super().__init__(layout.L + layout.S, text)
        self.layout, self.text = layout, text

    def _of_text(self) -> tuple[Tensor, ...]:
        self.calls += 1
        return self.text[self.calls - 1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        k, v = (torch.cat(pair, 2) for pair in zip(self._of_text(), (k, v), strict=True))
        return thought_attention(q, k, v, self.layout, query_rows="thoughts", **options)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return thought_conv(x, weight, bias, self.layout, self._of_text()[0][:, 0])

    def recur(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
        return thought_delta(q, k, v, g, beta, self.layout, DeltaRows(*self._of_text()))[0]


# What the rows of a branch leave for its later ones: as a tuple what each row left, [B,X,C,S,...], or one tensor that every row
# replaces: the last inputs of a convolution [B,1,C,W-1,D], or the state of a recurrence [B,H,C,K,E].
Own = Any


def as_state(rows: int, K: int, E: int) -> bool:
    """Whether a recurrence keeps less for a branch of so many rows as a state than as what its rows left."""
    return rows > 1 and rows * (K + E) > K * E


@dataclass
class Entry:
    """What rows left at one call: of the text [B,X,L,...] and of branches; the states of a recurrence at chunk starts."""

    text: Any
    width: int | None  # of a convolution
    states: Any
    own: Own = ()

    def begin(self, layout: ThoughtLayout, rows: int) -> None:
        """Start the branches of a layout, with room for S rows of each, or with what the text's rows before them left.

        ``rows``: how many they may come to have.
        """
        if self.width is not None:
            self.own = conv_tails(self.text[0][:, 0], layout, self.width)[:, None]
        elif self.states is not None and as_state(rows, *self.states.shape[-2:]):
            self.own = anchor_states(DeltaRows(*self.text), self.states, layout)
        else:
            make = Tensor.new_empty if self.states is None else Tensor.new_zeros  # a recurrence multiplies later rows with zero
            self.own = tuple(make(x, (*x.shape[:2], layout.P * layout.N, layout.S, *x.shape[3:])) for x in self.text)


class ThoughtStore:
    """What the text and each thought's rows so far left for later rows, for every call of a forward that mixes rows.

    Args:
        layout: the text and its thoughts.
        capacity: text positions to allocate, L or more, so that the text can grow without moving a tensor. The store's layouts
            then have this many text positions, and no row sees those without a token. None: the text does not grow.
    """

    def __init__(self, layout: ThoughtLayout, capacity: int | None = None):
        self.capacity = capacity
        self.merged: Merged | None = None
        self.angles: tuple[Tensor, Tensor] | None  # cos and sin [B,P*N,S,K] of all rows
        self.text_layout = layout.text_only()
        self.entries: list[Entry] = []
        self._set(layout if capacity is None else replace(layout, lo=_extended(layout.lo, capacity)))

    def restart(self, layout: ThoughtLayout) -> None:
        """Start another text in the same memory."""
        self.text_layout = layout.text_only()
        self.layout.lo.copy_(_extended(layout.lo, self.layout.L))

    def grow(self, capacity: int) -> None:
        """Allocate more text positions; every tensor is replaced."""
        self.capacity = capacity
        self._set(replace(self.layout.text_only(), lo=_extended(self.layout.lo, capacity)))
        for entry in self.entries:
            entry.text = tuple(padded(x, 2, capacity) for x in entry.text)
            if entry.states is not None:
                entry.states = text_states(DeltaRows(*entry.text), self.layout.lo)

    def begin(self, layout: ThoughtLayout) -> None:
        """Start new thoughts over the same text; earlier thoughts are discarded."""
        self._set(layout)
        for entry in self.entries:
            entry.begin(layout, layout.S)

    def begin_at(self, anchor: Tensor, length: Tensor, rows: int) -> None:
        """Start new thoughts at one text position, ``anchor`` [1], with ``length`` [B,1,N] rows each, at most ``rows``."""
        self.begin(ThoughtLayout(anchor.int().expand(self.layout.B, 1), self.layout.lo, length, rows))

    def keep_as_text(self, place: Tensor) -> None:
        """Turn row 0 of the only thought into text, at position ``place`` int64 [1]."""
        for entry in self.entries:
            new = (entry.own[:, :, :, -1],) if isinstance(entry.own, Tensor) else (x[:, :, 0] for x in entry.own)
            for text, x in zip(entry.text, new, strict=True):
                text.index_copy_(2, place, x)
            if entry.states is not None:
                advance_states(DeltaRows(*entry.text), entry.states, self.layout.lo, place)

    def take_text(self, call: int, *rows: Tensor, width: int | None = None) -> None:
        """Store what the text's rows [B,X,L,...] left at a call; ``width`` of a convolution."""
        if call == len(self.entries):
            rows = tuple(x if self.capacity is None else padded(x, 2, self.capacity) for x in rows)
            states = text_states(DeltaRows(*rows), self.layout.lo) if len(rows) == len(DeltaRows._fields) else None
            self.entries.append(Entry(rows, width, states))
            self.entries[call].begin(self.layout, self.layout.S)
            return
        entry = self.entries[call]  # graphs read the tensors where they are
        for text, x in zip(entry.text, rows, strict=True):
            text[:, :, : self.text_layout.L].copy_(x)
        if entry.states is not None:
            entry.states.copy_(text_states(DeltaRows(*entry.text), self.layout.lo))

    def _set(self, layout: ThoughtLayout) -> None:
        self.layout, self.angles = layout, None
        self.positions = layout.position_ids()[:, layout.L :].unflatten(1, (layout.P * layout.N, layout.S))


def _extended(lo: Tensor, capacity: int) -> Tensor:
    """A copy of lo [B,L] with ``capacity`` positions; new ones belong to the last position's document."""
    return torch.cat([lo, lo[:, -1:].expand(-1, capacity - lo.shape[1])], 1)


def padded(x: Tensor, dim: int, size: int) -> Tensor:
    """A copy of what rows left, with ``size`` of them along ``dim``, zero where there is none."""
    wide = x.new_zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    wide.narrow(dim, 0, x.shape[dim]).copy_(x)
    return wide


class TextPass(PackedPass):
    """Only the text; what its rows leave goes to the store."""

    def __init__(self, store: ThoughtStore):
        super().__init__(store.text_layout, store.text_layout.L)
        self.store = store

    def keep(self, *rows: Tensor, width: int | None = None) -> None:
        self.store.take_text(self.calls, *rows, width=width)


class StepPass(ThoughtPass):
    """Row ``step`` of all branches: reads what the text and its branch left, and leaves its own there."""

    def __init__(self, entries: list[Entry], layout: ThoughtLayout, step: int, store: ThoughtStore | None = None):
        super().__init__(layout.L + layout.S, entries, None if store is None else store.merged)
        self.store = store
        self.entries, self.layout, self.step = entries, layout, step
        self.now = torch.full((), step, dtype=torch.int32, device=layout.device)  # once, for all calls

    def _entry(self) -> Entry:
        self.calls += 1
        return self.entries[self.calls - 1]

    def _write(self, own: Own, *new: Tensor) -> None:
        for rows, x in zip(own, new, strict=True):
            rows.select(3, self.step).copy_(x)  # an assignment would make torch.compile build a graph for each step

    def angles(self, frequencies: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all steps are computed in the first."""
        if self.store is None:
            return super().angles(frequencies, position_ids)
        if self.store.angles is None:
            self.store.angles = super().angles(frequencies, self.store.positions)
        cos, sin = self.store.angles
        return cos[:, :, self.step], sin[:, :, self.step]

    def rotate(self, *inputs: Any, **options: Any) -> tuple[Tensor, None, None]:
        return rotary_decode(*(*inputs, *self.entries[self.calls].own, self.now), **options), None, None

    def attend(self, q: Tensor, k: Any, v: Any, **options: Any) -> Tensor:
        entry = self._entry()
        if k is not None:
            self._write(entry.own, k, v)
        (k_text, v_text), (k_own, v_own) = entry.text, entry.own
        return thought_decode(q, k_text, v_text, k_own, v_own, self.layout, self.now, **options)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return thought_conv_decode(x, self._entry().own[:, 0], weight, bias)

    def recur(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
        entry = self._entry()
        text, as_rows = DeltaRows(*entry.text), not isinstance(entry.own, Tensor)
        own = DeltaRows(*entry.own) if as_rows else entry.own
        out, w = thought_delta_decode(q, k, v, g, beta, text, entry.states, own, self.layout, self.now)
        if as_rows:
            self._write(own, k, w, g)
        return out


# The pass of the forward that is running, for modules that transformers gives no keywords.
running: ContextVar[ThoughtPass | None] = ContextVar("running", default=None)


@contextmanager
def _running(thought_pass: ThoughtPass) -> Iterator[None]:
    token = running.set(thought_pass)
    try:
        yield
    finally:
        running.reset(token)


def decode_rows(model: PreTrainedModel, embeds: Tensor, position_ids: Tensor, thought_pass: ThoughtPass) -> Tensor:
    """One forward of the decoder with thoughts: embeds [B,rows,D] to last hidden states [B,rows,D]; there may be no rows."""
    rows = embeds.shape[1]
    if not rows:  # most layers can't run without any, and other processes wait for a sharded model's forward
        embeds, position_ids = (torch.cat([x, x.new_zeros((len(x), 1, *x.shape[2:]))], 1) for x in (embeds, position_ids))
        thought_pass = PackedPass(ThoughtLayout.every_position(len(embeds), 1, 1, 1, embeds.device).text_only())
    layout: ThoughtLayout | None = getattr(thought_pass, "layout", None)  # some have several
    one = _one(embeds) if layout is None else layout.table("one", _one)
    with nullcontext() if torch.compiler.is_compiling() else _running(thought_pass):
        hidden = backbone(model)(
            inputs_embeds=embeds,
            attention_mask=one.expand(embeds.shape[:2]),  # no row is padding; transformers casts masks that are not bool
            position_ids=position_ids,
            use_cache=False,
            thought_layout=thought_pass,
        ).last_hidden_state
    calls, stored = thought_pass.calls, thought_pass.stored
    known = calls if stored is None else len(stored)
    if not calls or calls != known or thought_pass.convolutions != convolutions(model):  # the numbers would be silently wrong
        raise ValueError(
            f"{type(model).__name__}: the thought layout did not reach every layer that mixes rows, so this model can't think; "
            "its layers drop keyword arguments, do not use transformers' AttentionInterface, or run a kernel for a whole layer"
        )
    return hidden[:, :rows]


def decode_text(model: PreTrainedModel, embeds: Tensor, store: ThoughtStore) -> Tensor:
    """embeds [B,L,D] of a text to last hidden states; what its rows leave goes to the store, whose steps come next."""
    store.merged = merge(groups_of(model), store.merged)
    return decode_rows(model, embeds, store.text_layout.text_position_ids(), TextPass(store))


def _one(place: Tensor | ThoughtLayout) -> Tensor:
    return torch.ones((1, 1), dtype=torch.bool, device=place.device)


def decode_step(model: PreTrainedModel, embeds: Tensor, store: ThoughtStore, step: int) -> Tensor:
    """Row ``step`` of every thought in the store: embeds [B,P*N,D] to last hidden states [B,P*N,D]."""
    return decode_rows(model, embeds, store.positions[:, :, step], StepPass(store.entries, store.layout, step, store))
