"""Forwards of the decoder over rows of text and thoughts, and what they do at their attention calls.

transformers carries a pass to attention as the keyword ``thought_layout``. Calls are counted instead of reading a layer
index, because a model may call attention more than once in a layer.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.hf.modules import backbone
from quietstar_kernels import ThoughtLayout, thought_attention, thought_decode


class ThoughtPass:
    """Computes the attention calls of one forward.

    Attributes:
        positions: a bound on position ids: all are smaller.
        stored: what an earlier forward left for each call; None for passes that need nothing.
        calls: how many there were.
    """

    def __init__(self, positions: int, stored: Sized | None = None):
        self.positions, self.stored, self.calls = positions, stored, 0

    @property
    def arrived(self) -> bool:
        """After the forward: whether it made every attention call through this object."""
        return self.calls > 0 and (self.stored is None or self.calls == len(self.stored))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q [B,H,rows,K], k [B,G,rows,K], v [B,G,rows,E] to [B,H,rows,E]; options of ``thought_attention``."""
        raise NotImplementedError


class PackedPass(ThoughtPass):
    """The differentiable pass: text and all thought rows at once."""

    def __init__(self, layout: ThoughtLayout):
        super().__init__(layout.L + layout.S)
        self.layout = layout

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        return thought_attention(q, k, v, self.layout, **options)


class LeafPass(ThoughtPass):
    """Only the text, differentiable. ``keys_values`` holds the keys and values of each attention call after the forward."""

    def __init__(self, layout: ThoughtLayout):
        super().__init__(layout.L)
        self.layout = layout.text_only()
        self.done = False
        self.with_gradients = True
        self.keys_values: list[tuple[Tensor, Tensor]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        if not self.done:  # checkpointed layers call again in the backward
            self.keys_values.append((k, v))
            self.with_gradients &= torch.is_grad_enabled()
        return thought_attention(q, k, v, self.layout, **options)


class ChunkPass(ThoughtPass):
    """All thought rows of some anchors, differentiable, over the keys and values of an earlier ``LeafPass``."""

    def __init__(self, layout: ThoughtLayout, keys_values: list[tuple[Tensor, Tensor]]):
        super().__init__(layout.L + layout.S, keys_values)
        self.layout, self.keys_values = layout, keys_values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        k_text, v_text = self.keys_values[self.calls]
        self.calls += 1
        k, v = torch.cat([k_text, k], 2), torch.cat([v_text, v], 2)
        return thought_attention(q, k, v, self.layout, query_rows="thoughts", **options)


@dataclass
class _Entry:
    """Keys and values of one attention call: text [B,G,L,width], thoughts [B,G,P*N,S,width]."""

    k_text: Tensor
    v_text: Tensor
    k_own: Tensor
    v_own: Tensor


class ThoughtStore:
    """Keys and values of the text and of each thought's rows so far, for every attention call of a forward.

    Args:
        layout: the text and its thoughts.
        capacity: text positions to allocate, L or more, so that the text can grow without moving a tensor. The store's layouts
            then have this many text positions, and no row sees those without a token. None: the text does not grow.
    """

    def __init__(self, layout: ThoughtLayout, capacity: int | None = None):
        self.capacity = capacity
        self.text_layout = layout.text_only()
        self.entries: list[_Entry] = []
        self._set(layout if capacity is None else replace(layout, lo=_extended(layout.lo, capacity)))

    def restart(self, layout: ThoughtLayout) -> None:
        """Start another text in the same memory."""
        self.text_layout = layout.text_only()
        self.layout.lo.copy_(_extended(layout.lo, self.layout.L))

    def grow(self, capacity: int) -> None:
        """Allocate more text positions; every tensor is replaced."""
        self.capacity = capacity
        for entry in self.entries:
            entry.k_text, entry.v_text = _padded(entry.k_text, capacity), _padded(entry.v_text, capacity)
        self._set(replace(self.layout.text_only(), lo=_extended(self.layout.lo, capacity)))

    def begin(self, layout: ThoughtLayout) -> None:
        """Start new thoughts over the same text; earlier thoughts are discarded."""
        self._set(layout)
        for entry in self.entries:
            entry.k_own, entry.v_own = self._new_rows(entry.k_text), self._new_rows(entry.v_text)

    def begin_at(self, anchor: Tensor, length: Tensor, rows: int) -> None:
        """Start new thoughts at one text position, ``anchor`` [1], with ``length`` [B,1,N] rows each, at most ``rows``."""
        self.begin(ThoughtLayout(anchor.int().expand(self.layout.B, 1), self.layout.lo, length, rows))

    def keep_as_text(self, place: Tensor) -> None:
        """Turn row 0 of the only thought into text, at position ``place`` int64 [1]."""
        for entry in self.entries:
            entry.k_text.index_copy_(2, place, entry.k_own[:, :, 0])
            entry.v_text.index_copy_(2, place, entry.v_own[:, :, 0])

    def take_text(self, call: int, k: Tensor, v: Tensor) -> None:
        """Store the text's keys and values [B,G,L,width] of an attention call."""
        if call == len(self.entries):
            k_text, v_text = (x if self.capacity is None else _padded(x, self.capacity) for x in (k, v))
            self.entries.append(_Entry(k_text, v_text, self._new_rows(k), self._new_rows(v)))
        else:
            self.entries[call].k_text[:, :, : self.text_layout.L].copy_(k)
            self.entries[call].v_text[:, :, : self.text_layout.L].copy_(v)

    def _set(self, layout: ThoughtLayout) -> None:
        self.layout = layout
        self.positions = layout.position_ids()[:, layout.L :].unflatten(1, (layout.P * layout.N, layout.S))

    def _new_rows(self, text: Tensor) -> Tensor:
        """Uninitialised thought rows [B,G,P*N,S,width] for a text's [B,G,L,width]."""
        B, G, _, width = text.shape
        return text.new_empty((B, G, self.layout.P * self.layout.N, self.layout.S, width))


def _extended(lo: Tensor, capacity: int) -> Tensor:
    """A copy of lo [B,L] with ``capacity`` positions; new ones belong to the last position's document."""
    return torch.cat([lo, lo[:, -1:].expand(-1, capacity - lo.shape[1])], 1)


def _padded(x: Tensor, capacity: int) -> Tensor:
    """A copy of a text's [B,G,L,width] with ``capacity`` positions, zero where there is no token."""
    wide = x.new_zeros((*x.shape[:2], capacity, x.shape[3]))
    wide[:, :, : x.shape[2]] = x
    return wide


class TextPass(ThoughtPass):
    """Only the text; its keys and values go to the store."""

    def __init__(self, store: ThoughtStore):
        super().__init__(store.text_layout.L)
        self.store = store

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.store.take_text(self.calls, k, v)
        self.calls += 1
        return thought_attention(q, k, v, self.store.text_layout, **options)


class StepPass(ThoughtPass):
    """Row ``step`` of all thoughts: writes its keys and values, then reads those of the text and of its thought."""

    def __init__(self, store: ThoughtStore, step: int):
        super().__init__(store.layout.L + store.layout.S, store.entries)
        self.store, self.step = store, step
        self.now = torch.full((), step, dtype=torch.int32, device=store.layout.device)  # once, for all calls

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        entry = self.store.entries[self.calls]
        self.calls += 1
        entry.k_own.select(3, self.step).copy_(k)  # an assignment would make torch.compile build a graph for each step
        entry.v_own.select(3, self.step).copy_(v)
        return thought_decode(q, entry.k_text, entry.v_text, entry.k_own, entry.v_own, self.store.layout, self.now, **options)


class _OwnRow(ThoughtPass):
    """Rows that see only themselves."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def decode_rows(model: PreTrainedModel, embeds: Tensor, position_ids: Tensor, thought_pass: ThoughtPass) -> Tensor:
    """One forward of the decoder with thoughts: embeds [B,rows,D] to last hidden states [B,rows,D]; there may be no rows."""
    rows = embeds.shape[1]
    if not rows:  # most layers can't run without any, and other processes wait for a sharded model's forward
        embeds, position_ids = (torch.cat([x, x.new_zeros((len(x), 1, *x.shape[2:]))], 1) for x in (embeds, position_ids))
        thought_pass = _OwnRow(1)
    ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    hidden = backbone(model)(
        inputs_embeds=embeds, attention_mask=ones, position_ids=position_ids, use_cache=False, thought_layout=thought_pass
    ).last_hidden_state
    if not thought_pass.arrived:  # the numbers would be silently wrong
        raise ValueError(
            f"{type(model).__name__}: the thought layout did not reach every attention call, so this model cannot think; "
            "its layers drop keyword arguments or do not use transformers' AttentionInterface"
        )
    return hidden[:, :rows]


def decode_step(model: PreTrainedModel, embeds: Tensor, store: ThoughtStore, step: int) -> Tensor:
    """Row ``step`` of every thought in the store: embeds [B,P*N,D] to last hidden states [B,P*N,D]."""
    return decode_rows(model, embeds, store.positions[:, :, step], StepPass(store, step))
