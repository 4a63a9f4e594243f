"""Sampling of thoughts that end themselves: only live thoughts hold memory, and a freed slot goes to the next anchor.

Thoughts that begin together form a cohort, which keeps what their rows left. A forward runs the next row of all cohorts; only
what mixes rows is computed cohort by cohort, since their rows have different numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quietstar.hf.decoder import StepPass, TextPass, ThoughtPass, ThoughtStore, decode_rows, padded
from quietstar.hf.modules import dropout_off, embeddings, largest, sharding_group
from quietstar.texts import Texts
from quietstar.thinking.forward import Thinker
from quietstar.thinking.rollout import Thoughts, on_device
from quietstar.thinking.text_thoughts import Marks
from quietstar_kernels import ThoughtLayout

FIRST_ROWS = 64  # of a cohort's memory, which is doubled when they are full
NEW = 1 / 8  # the share of places that must be free before a new cohort begins, since each makes every step a little slower
DROP = 7 / 8  # a cohort with no more than this share of its places live moves together


class Cohort:
    """Thoughts that begin together.

    Attributes:
        place: int64 [B,C], the number p*N + n of each thought; -1 where there is none.
        anchor: int32 [B,C], its anchor; -1 where there is none.
        token: int64 [B,C], the last token, which is the next input.
        recent: int64 [B,C,E], the last sampled tokens.
        row: how many rows have been run.
        entries: what its rows left at each call, with what the text's did in ``store``.
    """

    def __init__(self, place: Tensor, anchor: Tensor, store: ThoughtStore, marks: Marks, most: int):
        self.place, self.anchor, self.marks = place, anchor, marks
        self.token = torch.full_like(place, marks.start[0])
        self.recent = torch.full((*place.shape, len(marks.end)), -1, dtype=torch.int64, device=place.device)
        self.row, self._lo, self._most, self._rows = 0, store.layout.lo, most, min(FIRST_ROWS, most)
        self._lay_out()
        self.entries = [replace(entry) for entry in store.entries]
        for entry in self.entries:
            entry.begin(self.layout, most)

    def _lay_out(self) -> None:
        length = torch.where(self.anchor >= 0, self._most, 0).int().clamp(max=self._rows)
        self.layout = ThoughtLayout(self.anchor, self._lo, length[..., None], self._rows)

    def advance(self) -> None:
        """Count a row; make room for the next."""
        self.row += 1
        if self.row == self._rows < self._most:
            self._rows = min(2 * self._rows, self._most)
            for entry in self.entries:
                if not isinstance(entry.own, Tensor):
                    entry.own = tuple(padded(x, 3, self._rows) for x in entry.own)
            self._lay_out()

    def keep(self, live: Tensor) -> None:
        """Drop the thoughts that have ended, and their memory. ``live`` bool [B,C]."""
        width = int(live.sum(1).max())  # of the widest text
        order = (~live).int().argsort(dim=1, stable=True)[:, :width]
        kept = live.gather(1, order)
        self.place = self.place.gather(1, order).masked_fill(~kept, -1)
        self.anchor = self.anchor.gather(1, order).masked_fill(~kept, -1)
        self.token = self.token.gather(1, order)
        self.recent = self.recent.gather(1, order[..., None].expand(-1, -1, self.recent.shape[2]))

        def of(x: Tensor) -> Tensor:
            return torch.stack([x[b].index_select(1, order[b]) for b in range(len(x))])

        for entry in self.entries:
            entry.own = of(entry.own) if isinstance(entry.own, Tensor) else tuple(map(of, entry.own))
        self._lay_out()


class CohortsPass(ThoughtPass):
    """The next row of all cohorts, side by side."""

    def __init__(self, store: ThoughtStore, cohorts: list[Cohort], positions: int):
        super().__init__(positions, store.entries)
        self.steps = [StepPass(cohort.entries, cohort.layout, cohort.row) for cohort in cohorts]

    def _parts(self, dim: int, *tensors: Tensor | None) -> Iterator[Any]:
        """The step of each cohort with its part of the tensors."""
        self.calls += 1
        widths = [step.layout.P for step in self.steps]
        parts = ([None] * len(widths) if x is None else x.split(widths, dim) for x in tensors)
        return zip(self.steps, *parts, strict=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return torch.cat([step.attend(*own, **options) for step, *own in self._parts(2, q, k, v)], 2)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.cat([step.convolve(own, weight, bias) for step, own in self._parts(1, x)], 1)

    def recur(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
        return torch.cat([step.recur(*own) for step, *own in self._parts(2, q, k, v, g, beta)], 2)


@torch.no_grad()
def sample_text_thoughts(thinker: Thinker, texts: Texts, seed: int, temperature: float, live: int | None = None) -> Thoughts:
    """Sample the tokens of every thought of some texts up to its end; at temperature 0 one for all N of an anchor.

    A thought's tokens depend on its text, its anchor, n and the seed: not on what else is sampled with it. Where weights are
    sharded, all processes take as many steps as the one with the most.

    Args:
        seed: 64 bits; with (sequence id, position from lo, n, s) it fixes every random number.
        live: the most thoughts of a text at a time; default all.
    """
    assert thinker.marks is not None
    model, marks, layout = thinker.model, thinker.marks, texts.layout
    # 1. Greedy thoughts of an anchor are identical, so that one is sampled for all.
    (B, P, N), T, device = layout.length.shape, thinker.config.thought_tokens, texts.device
    if temperature == 0 and N > 1:
        one, fewer = replace(layout, length=layout.length.amax(2, keepdim=True)), live and -(-live // N)
        return sample_text_thoughts(thinker, replace(texts, layout=one), seed, temperature, fewer).copies(N)
    # 2. The queue: of each text, the places that think, one after another.
    queue = ((layout.anchor >= 0)[..., None] & (layout.length > 0)).flatten(1)
    order = (~queue).int().argsort(dim=1, stable=True)
    counts = queue.sum(1)
    width = min(live or P * N, int(counts.max()) if B else 0)
    # One spare slot takes discarded draws, so a step writes unconditionally and never waits for the device.
    ids = torch.zeros((B, P * N + 1, T), dtype=torch.int64, device=device)
    logprob = torch.zeros((B, P * N + 1, T), device=device)
    lengths = torch.zeros((B, P * N + 1), dtype=torch.int64, device=device)
    with dropout_off(model):
        # 3. The text runs once.
        store = ThoughtStore(layout.text_only())
        decode_rows(model, embeddings(model)(texts.input_ids), layout.text_position_ids(), TextPass(store))
        rollout = _Rollout(thinker, marks, texts, store, on_device(seed, device), temperature)
        # 4. A row of all live thoughts at a time; where enough places are free, the next thoughts of the queue begin.
        taken = torch.zeros_like(counts)
        cohorts: list[Cohort] = []
        group = sharding_group(model)
        while True:
            left = counts - taken
            free = width - sum(((c.place >= 0).sum(1) for c in cohorts), torch.zeros_like(counts))
            begin = torch.minimum(free, left).clamp(min=0)
            most = int(begin.max()) if B else 0
            if most and (not cohorts or most >= NEW * width or bool((begin == left).all())):
                index = taken[:, None] + torch.arange(most, device=device)
                place = order.gather(1, index.clamp(max=P * N - 1))
                place = torch.where(torch.arange(most, device=device) < begin[:, None], place, -1)
                anchor = layout.anchor.gather(1, place.clamp(min=0) // N).masked_fill(place < 0, -1)
                cohorts.append(Cohort(place, anchor, store, marks, len(marks.start) + T))
                taken = taken + begin
            if not largest(group, len(cohorts), device):
                break
            cohorts = rollout.step(cohorts, ids, logprob, lengths)
    ids, logprob, lengths = (x[:, :-1].unflatten(1, (P, N)) for x in (ids, logprob, lengths))
    return Thoughts(ids, logprob, lengths)


@dataclass(frozen=True)
class _Rollout:
    """Steps of all cohorts."""

    thinker: Thinker
    marks: Marks
    texts: Texts
    store: ThoughtStore  # of the text
    seed: Tensor
    temperature: float

    def step(self, cohorts: list[Cohort], ids: Tensor, logprob: Tensor, lengths: Tensor) -> list[Cohort]:
        """Run a row of every thought and sample; the cohorts that still have live thoughts."""
        model, marks, layout, T = self.thinker.model, self.marks, self.texts.layout, self.thinker.config.thought_tokens
        text_position, embed = layout.text_position_ids(), embeddings(model)
        step = CohortsPass(self.store, cohorts, layout.L + len(marks.start) + T)
        if not cohorts:  # but in other processes, which gather this one's part of the weights
            decode_rows(model, embed(text_position[:, :0]), text_position[:, :0], step)
            return cohorts
        # 1. The next row of each thought.
        anchor = torch.cat([c.anchor for c in cohorts], 1).long().clamp(min=0)
        place = torch.cat([c.place for c in cohorts], 1)
        row = torch.cat([torch.full_like(c.place, c.row) for c in cohorts], 1)
        position = text_position.gather(1, anchor)
        tokens = torch.cat([c.token for c in cohorts], 1).clamp(min=0)
        hidden = decode_rows(model, embed(tokens), position + 1 + row, step)
        # 2. A token for each.
        s = row - (len(marks.start) - 1)  # which token a row predicts; below 0 in the start string
        numbers = place.clamp(min=0) % layout.N, s.clamp(min=0)
        counters = torch.stack([self.texts.sequence_ids.gather(1, anchor), position, *numbers], -1)
        drawn, value = self.thinker.lm_head.sample(hidden, counters.int(), self.seed, self.temperature, ())
        batch = torch.arange(len(place), device=place.device)[:, None]
        kept_at = torch.where((place >= 0) & (s >= 0), place, ids.shape[1] - 1)
        s = s.clamp(min=0)
        ids[batch, kept_at, s], logprob[batch, kept_at, s], lengths[batch, kept_at] = drawn, value, s + 1
        # 3. Who goes on: in the start string all; later those that didn't end.
        kept = []
        for c, some in zip(cohorts, drawn.split([c.place.shape[1] for c in cohorts], 1), strict=True):
            c.advance()
            if c.row < len(marks.start):
                c.token = torch.full_like(c.token, marks.start[c.row])
                kept.append(c)
                continue
            c.token = some
            c.recent = torch.cat([c.recent[..., 1:], some[..., None]], -1)
            ended = (c.recent == some.new_tensor(marks.end)).all(-1) | torch.isin(some, some.new_tensor(marks.stops))
            over = c.row - len(marks.start) + 1 >= T
            live = (c.place >= 0) & ~ended & (some >= 0) if not over else torch.zeros_like(ended)
            c.place = c.place.masked_fill(~live, -1)
            most = int(live.sum(1).max())
            if most <= DROP * live.shape[1]:
                c.keep(live)
            if most:
                kept.append(c)
        return kept
