"""Sampling of thoughts that end themselves: only live thoughts hold memory, and a freed slot goes to the next anchor.

Thoughts that begin together form a cohort, which keeps what their rows left. A forward runs the next row of all cohorts; only
what mixes rows is computed cohort by cohort, since their rows have different numbers.

The host decides from the number of live thoughts of each text. On a GPU it looks at counts of ``LAG`` steps before, so that the
device always has work; since counts only fall, these are bounds. A fixed lag, unlike what happens to have arrived, gives each
run the same cohorts, and so the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quietstar.hf.decoder import StepPass, ThoughtPass, ThoughtStore, decode_rows, decode_text, padded
from quietstar.hf.modules import dropout_off, embeddings, largest, sharding_group
from quietstar.texts import Texts
from quietstar.thinking.forward import Thinker
from quietstar.thinking.rollout import HostCopy, Thoughts, on_device, sent
from quietstar.thinking.text_thoughts import Marks
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import on_host

FIRST_ROWS = 64  # of a cohort's memory, which is doubled when they are full
NEW = 1 / 8  # the share of places that must be free before a new cohort begins, since each makes every step a little slower
DROP = 7 / 8  # a cohort with no more than this share of its places live moves together
LAG = 2  # steps that are queued while the host waits for the counts of the one before them


class Cohort:
    """Thoughts that begin together.

    Attributes:
        place: int64 [B,C], the number p*N + n of each thought; -1 where there is none.
        anchor: int32 [B,C], its anchor; -1 where there is none.
        token: int64 [B,C], the last token, which is the next input.
        recent: int64 [B,C,E], the last sampled tokens.
        live: of each text, how many thoughts are live by the last counts that the host has read.
        row: how many rows have been run.
        entries: what its rows left at each call, with what the text's did in ``store``.
    """

    def __init__(self, place: Tensor, anchor: Tensor, live: list[int], store: ThoughtStore, marks: Marks, most: int):
        self.place, self.anchor, self.live = place, anchor, live
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

    def drop_ended(self) -> None:
        """Where many have ended, drop them and their memory."""
        width = max(self.live)
        if width > DROP * self.place.shape[1]:
            return
        order = (self.place < 0).int().argsort(dim=1, stable=True)[:, :width]
        self.place = self.place.gather(1, order)
        self.anchor = self.anchor.gather(1, order).masked_fill(self.place < 0, -1)
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
        super().__init__(positions, store.entries, store.merged)
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
    copied = HostCopy(queue.sum(1))
    # One spare slot takes discarded draws, so a step writes unconditionally and never waits for the device.
    ids = torch.zeros((B, P * N + 1, T), dtype=torch.int64, device=device)
    logprob = torch.zeros((B, P * N + 1, T), device=device)
    lengths = torch.zeros((B, P * N + 1), dtype=torch.int64, device=device)
    with dropout_off(model):
        # 3. The text runs once.
        store = ThoughtStore(layout.text_only())
        decode_text(model, embeddings(model)(texts.input_ids), store)
        end, stops = sent(marks.end, device), sent(marks.stops, device)
        rollout = _Rollout(thinker, marks, end, stops, texts, store, on_device(seed, device), temperature)
        # 4. A row of all live thoughts at a time; where enough places are free, the next thoughts of the queue begin.
        counts, taken = copied.tolist(), [0] * B
        width = min(live or P * N, max(counts, default=0))
        cohorts: list[Cohort] = []
        late: deque[tuple[list[list[int]], HostCopy]] = deque()
        group = sharding_group(model)
        lag = LAG if group is None and not on_host(queue) else 0
        while True:
            left = [x - n for x, n in zip(counts, taken, strict=True)]
            begin = [min(width - sum(c.live[b] for c in cohorts), left[b]) for b in range(B)]
            most = max(begin, default=0)
            if most and (not cohorts or most >= NEW * width or begin == left):
                first, number = sent((taken, begin), device)[..., None]
                new = torch.arange(most, device=device)
                place = torch.where(new < number, order.gather(1, (first + new).clamp(max=P * N - 1)), -1)
                anchor = layout.anchor.gather(1, place.clamp(min=0) // N).masked_fill(place < 0, -1)
                cohorts.append(Cohort(place, anchor, begin, store, marks, len(marks.start) + T))
                taken = [x + n for x, n in zip(taken, begin, strict=True)]
            if not largest(group, len(cohorts), device):
                break
            cohorts = rollout.step(cohorts, ids, logprob, lengths)
            if cohorts:
                late.append(([c.live for c in cohorts], HostCopy(torch.stack([(c.place >= 0).sum(1) for c in cohorts]))))
            if len(late) > lag:
                known, counted = late.popleft()
                for of_cohort, now in zip(known, counted.tolist(), strict=True):
                    of_cohort[:] = now
            cohorts = [c for c in cohorts if any(c.live)]
            for c in cohorts:
                c.drop_ended()
    ids, logprob, lengths = (x[:, :-1].unflatten(1, (P, N)) for x in (ids, logprob, lengths))
    return Thoughts(ids, logprob, lengths)


@dataclass(frozen=True)
class _Rollout:
    """Steps of all cohorts."""

    thinker: Thinker
    marks: Marks
    end: Tensor  # int64 [E], the end string
    stops: Tensor  # int64, tokens that end a thought too
    texts: Texts
    store: ThoughtStore  # of the text
    seed: Tensor
    temperature: float

    def step(self, cohorts: list[Cohort], ids: Tensor, logprob: Tensor, lengths: Tensor) -> list[Cohort]:
        """Run a row of every thought and sample; the cohorts that have rows left. Reads nothing from the device."""
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
        for c, some in zip(cohorts, drawn.split([c.place.shape[1] for c in cohorts], 1), strict=True):
            c.advance()
            if c.row < len(marks.start):
                c.token = torch.full_like(c.token, marks.start[c.row])
                continue
            c.token = some
            c.recent = torch.cat([c.recent[..., 1:], some[..., None]], -1)
            ended = (c.recent == self.end).all(-1) | (some[..., None] == self.stops).any(-1)
            c.place = c.place.masked_fill(ended | (some < 0), -1)
        return [c for c in cohorts if c.row < len(marks.start) + T - 1]
