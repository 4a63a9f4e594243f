"""Steps of RLP (arXiv 2510.01265) without packing: anchor by anchor, or with a sequence for each thought.

Both run on transformers, with SDPA attention and a ``DynamicCache``. They draw with ``sample_token``, so that all ways have the
same thoughts; it is faster than softmax and multinomial. Logits are computed only where they are read.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from quietstar_kernels import sample_token

START, END = 0, 1  # the tokens around a thought
SEED = 1
CACHE = {"cpu": 2 << 30, "cuda": 32 << 30}  # bytes of keys and values of the sequences that are sampled together


class Way(ABC):
    """A way to make a step. A thought ends with END or after T tokens; its other places hold -1."""

    def __init__(self, case: Any):
        self.case, self.model = case, case.model()
        self.base = copy.deepcopy(self.model).requires_grad_(False)  # the averaged weights, as before the first update

    @abstractmethod
    def rollout(self, ids: Tensor) -> Tensor:
        """Thoughts [B,P,N,T] in texts [B,L]."""

    @abstractmethod
    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Thoughts and their rewards [B,P,N]; the gradients stay in the model."""

    def anchors(self) -> Iterator[tuple[int, int, int]]:
        """b, p, t of every anchor."""
        return ((b, p, t) for b in range(self.case.B) for p, t in enumerate(self.case.anchors))

    @torch.no_grad()
    def continue_from(self, cache: DynamicCache, shown: Tensor, counters: Tensor) -> Tensor:
        """Thoughts [n,T] after what the cache holds, until all have ended; ``shown`` [n,rows] is 0 at its padding."""
        token, head, temperature = torch.full_like(shown[:, :1], START), self.model.lm_head, self.case.config.temperature
        thoughts, over = shown.new_full((len(shown), self.case.T), -1), torch.zeros_like(token[:, 0], dtype=torch.bool)
        for s in range(self.case.T):
            shown = torch.cat([shown, torch.ones_like(token)], 1)
            rows = {"attention_mask": shown, "position_ids": shown.sum(1, keepdim=True) - 1, "past_key_values": cache}
            states = self.model.model(token, **rows).last_hidden_state[:, 0]
            at = torch.cat([counters, torch.full_like(counters[:, :1], s)], 1)
            drawn, _ = sample_token(states, head.weight, at, SEED, bias=head.bias, temperature=temperature)
            thoughts[:, s] = drawn.masked_fill(over, -1)
            over |= drawn == END
            if over.all():
                break
            token = drawn[:, None]
        return thoughts

    @torch.no_grad()
    def without_thoughts(self, ids: Tensor) -> Tensor:
        """log p [B,P] of the token after each anchor, by the averaged weights."""
        after = [t + 1 for t in self.case.anchors]
        return logprob(self.base(ids, use_cache=False).logits[:, self.case.anchors], ids[:, after])

    def losses(self, logits: Tensor, tokens: Tensor, advantage: Tensor) -> Tensor:
        """The clipped surrogate of each sampled token, whose mean over a thought is its part of the loss."""
        logp = logprob(logits / self.case.config.temperature, tokens)
        ratio, config = (logp - logp.detach()).exp(), self.case.config
        clipped = ratio.clamp(1 - config.ratio_clip, 1 + config.ratio_clip_high)
        return -torch.minimum(ratio * advantage, clipped * advantage) / (self.case.B * self.case.P * self.case.N)


class AnchorByAnchor(Way):
    """github.com/natekimball/GRLP: a text's cache, cut and repeated at each anchor; in the update, one thought after another.

    Each anchor has a backward of its own. There, the reward of a thought without an end lacks its last token; here it doesn't.
    """

    def rollout(self, ids: Tensor) -> Tensor:
        whole = [self._read(text) for text in ids]
        thoughts = [self._sample(whole[b], b, t)[0] for b, _, t in self.anchors()]
        return torch.stack(thoughts).view(self.case.B, self.case.P, self.case.N, self.case.T)

    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.model.zero_grad()
        without, whole = self.without_thoughts(ids), [self._read(text) for text in ids]
        thoughts, rewards = [], []
        for b, p, t in self.anchors():
            some, cache = self._sample(whole[b], b, t)
            thoughts.append(some)
            rewards.append(self._score(cache, some, t, ids[b, t + 1]) - without[b, p])
            self._learn(ids[b, : t + 1], some, leave_one_out(rewards[-1]))
        shape = self.case.B, self.case.P, self.case.N
        return torch.stack(thoughts).view(*shape, -1), torch.stack(rewards).view(shape)

    @torch.no_grad()
    def _read(self, text: Tensor) -> DynamicCache:
        cache = DynamicCache()
        self.model.model(text[None], past_key_values=cache)
        return cache

    def _sample(self, whole: DynamicCache, b: int, t: int) -> tuple[Tensor, DynamicCache]:
        """Thoughts [N,T] of an anchor, and the cache of their sequences."""
        cache, N = cut(whole, 0, t + 1), self.case.N
        cache.batch_repeat_interleave(N)
        counters = torch.tensor([[b, t, n] for n in range(N)], dtype=torch.int32, device=self.model.device)
        return self.continue_from(cache, counters.new_ones((N, t + 1), dtype=torch.int64), counters), cache

    @torch.no_grad()
    def _score(self, cache: DynamicCache, thoughts: Tensor, t: int, target: Tensor) -> Tensor:
        """log p [N] of the token after the anchor, thought by thought."""
        cached, found = cache.get_seq_length() - (t + 2), []  # of a thought; the last that was sampled is not in there
        for n, thought in enumerate(thoughts):
            own = content(thought)
            rest = torch.cat([own[cached:], own.new_tensor([END])])
            mine = cut(cache, n, t + 2 + min(cached, len(own)))
            logits = self.model(rest[None], past_key_values=mine, logits_to_keep=1).logits[0, 0]
            found.append(logprob(logits, target))
        return torch.stack(found)

    def _learn(self, before: Tensor, thoughts: Tensor, advantages: Tensor) -> None:
        loss = advantages.new_zeros(())
        for thought, advantage in zip(thoughts, advantages, strict=True):
            tokens = thought[thought >= 0]
            read = torch.cat([before, tokens.new_tensor([START]), tokens[:-1]])
            logits = self.model(read[None], use_cache=False, logits_to_keep=len(tokens)).logits[0]
            loss = loss + self.losses(logits, tokens, advantage).mean()
        loss.backward()


class SequencePerThought(Way):
    """Every thought after a copy of its prompt: sampled in the largest batches whose cache fits, trained an anchor at a time.

    Prompts are padded on the left. Sequences are padded on the right in training, where no row sees padding, so that attention
    needs no mask; larger batches would have more of it.
    """

    def rollout(self, ids: Tensor) -> Tensor:
        case, device = self.case, ids.device
        numbers = (torch.tensor(x, dtype=torch.int32) for x in (range(case.B), case.anchors, range(case.N)))
        counters = torch.cartesian_prod(*numbers).to(device)
        each = (case.L + case.T) * case.layers * 2 * case.G * case.K * case.dtype.itemsize
        batches = counters.split(max(1, CACHE[device.type] // each))
        return torch.cat([self._sample(ids, some) for some in batches]).view(case.B, case.P, case.N, case.T)

    @torch.no_grad()
    def _sample(self, ids: Tensor, counters: Tensor) -> Tensor:
        prompts = [ids[b, : t + 1] for b, t, _ in counters.tolist()]
        padded = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
        shown, cache = (padded >= 0).long(), DynamicCache()
        position = (shown.cumsum(1) - 1).clamp(min=0)
        rows = {"attention_mask": shown, "position_ids": position, "past_key_values": cache}
        self.model.model(padded.clamp(min=0), **rows)
        return self.continue_from(cache, shown, counters)

    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.model.zero_grad()
        without, thoughts, head = self.without_thoughts(ids), self.rollout(ids), self.model.lm_head
        rewards = without[..., None].repeat(1, 1, self.case.N)
        start, end = ids.new_tensor([[START], [END]])
        for b, p, t in self.anchors():
            tokens, own = thoughts[b, p], [content(thought) for thought in thoughts[b, p]]
            sequences = [torch.cat([ids[b, : t + 1], start, some, end]) for some in own]
            states = self.model.model(pad_sequence(sequences, batch_first=True), use_cache=False).last_hidden_state
            last = states[range(self.case.N), [len(sequence) - 1 for sequence in sequences]]
            rewards[b, p] = logprob(head(last), ids[b, t + 1].expand(self.case.N)).detach() - without[b, p]
            on = tokens[:, : int((tokens >= 0).sum(1).max())] >= 0
            tokens = tokens[:, : on.shape[1]].clamp(min=0)
            losses = self.losses(head(states[:, t + 1 : t + 1 + on.shape[1]]), tokens, leave_one_out(rewards[b, p])[:, None])
            (torch.where(on, losses, 0).sum(1) / on.sum(1)).sum().backward()
        return thoughts, rewards


def logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def leave_one_out(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)


def content(thought: Tensor) -> Tensor:
    return thought[(thought >= 0) & (thought != END)]


def cut(cache: DynamicCache, row: int, length: int) -> DynamicCache:
    """A copy of the first ``length`` positions of one sequence."""
    part = DynamicCache()
    for i, layer in enumerate(cache.layers):
        part.update(layer.keys[row : row + 1, :, :length], layer.values[row : row + 1, :, :length], i)
    return part
