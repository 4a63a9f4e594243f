"""What one model forward does at its attention calls: a packed pass, or a rollout step over stored keys and values.

The object travels through transformers as the keyword ``thought_layout``. Calls are counted instead of asking for a layer
index, because a model may call attention more than once in a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from quietstar_kernels import ThoughtLayout, thought_attention, thought_decode


class ThoughtPass(Protocol):
    """Serves the attention calls of one forward; ``arrived`` tells afterwards that there was one."""

    @property
    def positions(self) -> int:
        """No row stands at this position id or a later one."""
        ...

    @property
    def arrived(self) -> bool: ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q [B,H,rows,K], k [B,G,rows,K], v [B,G,rows,E] to [B,H,rows,E]; options of ``thought_attention``."""
        ...


class PackedPass:
    """The differentiable pass: text and all thought rows at once."""

    def __init__(self, layout: ThoughtLayout, backend: str = "auto"):
        self.layout = layout
        self.positions = layout.L + layout.S
        self.backend = backend
        self.arrived = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.arrived = True
        out = thought_attention(q, k, v, self.layout, backend=self.backend, **options)
        assert isinstance(out, Tensor)
        return out


@dataclass
class _Entry:
    """One attention call's keys and values: text [B,G,L,width], thoughts [B,G,P*N,S,width]."""

    k_text: Tensor
    v_text: Tensor
    k_own: Tensor
    v_own: Tensor


class ThoughtStore:
    """Keys and values of the text, kept, and of every thought's rows so far, for each attention call of a forward.

    Args:
        layout: the text, and thoughts over it.
        room: text positions that there is room for, L or more: the text can grow, and no tensor moves. Its layouts then have
            so many text positions, and no row sees those that hold no token yet. None: this text and no other.
    """

    def __init__(self, layout: ThoughtLayout, backend: str = "auto", room: int | None = None):
        self.backend = backend
        self.room = room
        self.text = layout.text_only()
        self.entries: list[_Entry] = []
        self._set(layout if room is None else replace(layout, lo=_longer(layout.lo, room)))

    def prefill(self) -> TextPass:
        return TextPass(self)

    def decode(self, step: int) -> StepPass:
        return StepPass(self, step)

    def restart(self, layout: ThoughtLayout) -> None:
        """Another text, in the room of the one before."""
        self.text = layout.text_only()
        self.layout.lo.copy_(_longer(layout.lo, self.layout.L))

    def grow(self, room: int) -> None:
        """Room for more text: all tensors are new ones."""
        self.room = room
        for entry in self.entries:
            entry.k_text, entry.v_text = _with_room(entry.k_text, room), _with_room(entry.v_text, room)
        self._set(replace(self.layout.text_only(), lo=_longer(self.layout.lo, room)))

    def hang(self, anchor: Tensor, length: Tensor, rows: int) -> None:
        """New thoughts on one text position, ``anchor`` [1], ``length`` [B,1,N] of at most ``rows``; those before are gone."""
        self.begin(ThoughtLayout(anchor.int().expand(self.layout.B, 1), self.layout.lo, length, rows))

    def begin(self, layout: ThoughtLayout) -> None:
        """New thoughts over the same text; those before are thrown away."""
        self._set(layout)
        for entry in self.entries:
            entry.k_own, entry.v_own = self._own_rows(entry.k_text), self._own_rows(entry.v_text)

    def keep(self, place: Tensor) -> None:
        """Row 0 of the only thought becomes text, at position ``place`` int64 [1]."""
        for entry in self.entries:
            entry.k_text.index_copy_(2, place, entry.k_own[:, :, 0])
            entry.v_text.index_copy_(2, place, entry.v_own[:, :, 0])

    def take_text(self, call: int, k: Tensor, v: Tensor) -> None:
        """The text's keys and values [B,G,L,width] at an attention call."""
        if call == len(self.entries):
            k_text, v_text = (x if self.room is None else _with_room(x, self.room) for x in (k, v))
            self.entries.append(_Entry(k_text, v_text, self._own_rows(k), self._own_rows(v)))
        else:
            self.entries[call].k_text[:, :, : self.text.L].copy_(k)
            self.entries[call].v_text[:, :, : self.text.L].copy_(v)

    def _set(self, layout: ThoughtLayout) -> None:
        self.layout = layout
        self.positions = layout.position_ids()[:, layout.L :].unflatten(1, (layout.P * layout.N, layout.S))

    def _own_rows(self, text: Tensor) -> Tensor:
        """Room for the thoughts' rows beside a text's [B,G,L,width]: [B,G,P*N,S,width], nothing written yet."""
        B, G, _, width = text.shape
        return text.new_empty((B, G, self.layout.P * self.layout.N, self.layout.S, width))


def _longer(lo: Tensor, room: int) -> Tensor:
    """A copy of lo [B,L] for ``room`` positions: what is still to come belongs to the last one's document."""
    return torch.cat([lo, lo[:, -1:].expand(-1, room - lo.shape[1])], 1)


def _with_room(x: Tensor, room: int) -> Tensor:
    """A copy of a text's [B,G,L,width] with ``room`` positions; zeros where no token stands."""
    wide = x.new_zeros((*x.shape[:2], room, x.shape[3]))
    wide[:, :, : x.shape[2]] = x
    return wide


class TextPass:
    """The text alone; its keys and values stay in the store."""

    def __init__(self, store: ThoughtStore):
        self.store = store
        self.layout = store.text
        self.positions = self.layout.L
        self.calls = 0

    @property
    def arrived(self) -> bool:
        return self.calls > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.store.take_text(self.calls, k, v)
        self.calls += 1
        out = thought_attention(q, k, v, self.layout, backend=self.store.backend, **options)
        assert isinstance(out, Tensor)
        return out


class LeafPass:
    """The text alone, differentiable; ``keys_values`` holds each attention call's keys and values after the forward."""

    def __init__(self, layout: ThoughtLayout):
        self.layout = layout.text_only()
        self.positions = self.layout.L
        self.arrived = False
        self.done = False
        self.with_gradients = True
        self.keys_values: list[tuple[Tensor, Tensor]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.arrived = True
        if not self.done:  # layer checkpoints call again in the backward
            self.keys_values.append((k, v))
            self.with_gradients &= torch.is_grad_enabled()
        out = thought_attention(q, k, v, self.layout, **options)
        assert isinstance(out, Tensor)
        return out


class ChunkPass:
    """All rows of some anchors' thoughts, differentiable, over the keys and values of a text that ran before."""

    def __init__(self, layout: ThoughtLayout, keys_values: list[tuple[Tensor, Tensor]]):
        self.layout = layout
        self.positions = layout.L + layout.S
        self.keys_values = keys_values
        self.calls = 0

    @property
    def arrived(self) -> bool:
        return self.calls == len(self.keys_values) > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        k_text, v_text = self.keys_values[self.calls]
        self.calls += 1
        k, v = torch.cat([k_text, k], 2), torch.cat([v_text, v], 2)
        out = thought_attention(q, k, v, self.layout, query_rows="thoughts", **options)
        assert isinstance(out, Tensor)
        return out


class StepPass:
    """Row ``step`` of all thoughts: writes its keys and values, then reads text and own rows."""

    def __init__(self, store: ThoughtStore, step: int):
        self.store = store
        self.positions = store.layout.L + store.layout.S
        self.step = step
        self.now = torch.full((), step, dtype=torch.int32, device=store.layout.device)  # once, for all calls
        self.calls = 0

    @property
    def arrived(self) -> bool:
        return self.calls == len(self.store.entries) > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        entry = self.store.entries[self.calls]
        self.calls += 1
        entry.k_own.select(3, self.step).copy_(k)  # torch.compile makes a graph for each step of an assignment
        entry.v_own.select(3, self.step).copy_(v)
        return thought_decode(
            q,
            entry.k_text,
            entry.v_text,
            entry.k_own,
            entry.v_own,
            self.store.layout,
            self.now,
            backend=self.store.backend,
            **options,
        )


def check_arrived(thought_pass: ThoughtPass, model: torch.nn.Module) -> None:
    """Raises where a forward never brought its layout to attention: its numbers would be silently wrong."""
    if not thought_pass.arrived:
        raise ValueError(
            f"{type(model).__name__}: the thought layout did not reach every attention call, so this model cannot think; "
            "its layers drop keyword arguments or do not use transformers' AttentionInterface"
        )
