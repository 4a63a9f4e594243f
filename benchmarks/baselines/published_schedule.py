"""The published code's schedule of a training step: pass after pass over all positions, each kept for the backward.

Rebuilt from its description (arXiv 2403.09629, section 4) and the published code. A pass adds one row to the thought of every
position. It runs N copies of the batch, over the rows of all earlier passes as keys, with a dense mask that is causal over the
text and diagonal over each earlier pass. Thoughts are sampled in the passes that carry gradients. The objective is that of
``QuietStar``, so loss and gradients are the same. Only the schedule and its memory differ.

It is cheaper than the published code: attention is SDPA, and the logits of sampled rows aren't kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from quietstar import QuietStar
from quietstar.hf.modules import backbone, embeddings
from quietstar.texts import Texts
from quietstar.thinking.forward import PackedInputs, Predictions
from quietstar.thinking.rollout import Thoughts
from quietstar_kernels import ThoughtLayout


class PublishedSchedule(QuietStar):
    """``QuietStar`` for texts without padding that thinks at every position, in one pass over the text and S more."""

    _passed: tuple[Tensor, Tensor] | None = None

    def sample(self, texts: Texts, seed: int | None, greedy: bool, anchor_chunk: int | None = None) -> Thoughts:
        assert not greedy and seed is not None
        T = self.thought_config.thought_tokens
        rows = texts.layout.S if torch.is_grad_enabled() else T  # without a gradient nothing after the last sample is needed
        *self._passed, ids, logprob = self._passes(texts.layout, texts.input_ids, None, seed, rows)
        return Thoughts(ids, logprob)

    def predict(self, inputs: PackedInputs) -> Predictions:
        if self._passed is None:
            self._passed = self._passes(inputs.layout, inputs.input_ids, inputs.thought_ids, 0, inputs.layout.S)[:2]
        (text, thought), self._passed = self._passed, None
        ids, lengths = inputs.thought_ids, inputs.thought_lengths
        ahead, logprob = self.thinker.end_states(thought, lengths), self.thinker.thought_logprob(thought, ids, lengths)
        return self.thinker.predict(inputs, text, ahead, logprob)

    def _passes(
        self, layout: ThoughtLayout, input_ids: Tensor, thought_ids: Tensor | None, seed: int, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text states [B,L,D], thought states [B,L,N,rows,D], thought ids [B,L,N,T], log-probabilities of sampled ids."""
        B, L, N, T = layout.B, layout.L, layout.N, self.thought_config.thought_tokens
        device = input_ids.device
        b, t, n = torch.meshgrid(*(torch.arange(size, device=device) for size in (B, L, N)), indexing="ij")
        copies = input_ids.repeat_interleave(N, 0)  # [B*N,L]
        cache, diagonal = DynamicCache(), torch.eye(L, dtype=torch.bool, device=device)
        mask = torch.ones_like(diagonal).tril()
        tokens = [] if thought_ids is None else list(thought_ids.unbind(-1))
        embeds, states, logprobs = embeddings(self.model)(copies), [], []
        for s in range(-1, rows):
            hidden = backbone(self.model)(
                inputs_embeds=embeds,
                attention_mask=_additive(mask, embeds.dtype),
                position_ids=torch.arange(s + 1, s + 1 + L, device=device)[None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            states.append(hidden.unflatten(0, (B, N)).transpose(1, 2))  # [B,L,N,D]
            if thought_ids is None and 0 <= s < T:
                counters = torch.stack([b, t, n, torch.full_like(n, s)], -1).int()
                ids, logprob = self.lm_head.sample(states[-1].detach(), counters, seed, 1.0, self.thought_config.banned)
                tokens.append(ids)
                logprobs.append(logprob)
            mask = torch.cat([mask, diagonal], 1)
            if s + 1 < rows:
                embeds = self._row(s + 1, copies, tokens)
        text, thought = states[0][:, :, 0], torch.stack(states[1:], 3)
        return text, thought, torch.stack(tokens, -1), torch.stack(logprobs, -1) if logprobs else thought[..., 0]

    def _row(self, s: int, copies: Tensor, tokens: list[Tensor]) -> Tensor:
        """Embeddings [B*N,L,D] of row s: the start, a sampled token, the end, or one of the text's following tokens."""
        T = self.thought_config.thought_tokens
        if s in (0, T + 1):
            vector = self.thinker.start if s == 0 else self.thinker.end
            return vector.expand(*copies.shape, -1)
        if s <= T:
            return embeddings(self.model)(tokens[s - 1].transpose(1, 2).flatten(0, 1))
        return embeddings(self.model)(copies.roll(-(s - T - 1), 1))  # what wraps around makes no prediction that counts


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)[None, None]
