"""The differentiable pass: states of a text and its thoughts, mixed predictions, log-probabilities (sections 4.2, 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar import checks
from quietstar.arguments.values import FLOATS, INTEGERS, instance, tensor
from quietstar.config import ThoughtConfig
from quietstar.hf.cache import PackedPass
from quietstar.hf.decoder import decode_rows
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import embeddings
from quietstar.objective import IGNORED, Targets, at_anchors
from quietstar_kernels import ThoughtLayout


class MixingHead(nn.Sequential):
    """Linear(2D,D), ReLU, Linear(D,D), ReLU, Linear(D,1), whose last layer starts at zero; its input is [text; thought]."""

    def __init__(self, width: int, device: torch.device | None = None):
        last = nn.Linear(width, 1, bias=False, device=device)
        nn.init.zeros_(last.weight)
        hidden = nn.Linear(2 * width, width, device=device), nn.ReLU(), nn.Linear(width, width, device=device), nn.ReLU()
        super().__init__(*hidden, last)

    def score(self, h_base: Tensor, h_thought: Tensor) -> Tensor:
        """fp32 [...,1] from two hidden states [...,D], in the head's own dtype whatever autocast says."""
        with torch.autocast(h_base.device.type, enabled=False):
            return self(torch.cat([h_base, h_thought], -1).to(next(self.parameters()).dtype)).float()


class PackedInputs(NamedTuple):
    """A text, its thoughts and what is predicted.

    Attributes:
        input_ids: int64 [B,L].
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N]; None where all thoughts have T tokens.
    """

    layout: ThoughtLayout
    input_ids: Tensor
    thought_ids: Tensor
    thought_lengths: Tensor | None
    targets: Targets

    def select(self, places: slice) -> PackedInputs:
        """Those of some of the anchors."""
        return PackedInputs(
            self.layout.select(places),
            self.input_ids,
            self.thought_ids[:, places],
            None if self.thought_lengths is None else self.thought_lengths[:, places],
            self.targets.select(places),
        )


class Predictions(NamedTuple):
    """What the objective is computed from, fp32, nats; 0 where a target does not count.

    Attributes:
        text: [B,L,D], last hidden states of the text.
        nll_base: [B,L-1], -log p_base of text token t+1.
        nll_compared: [B,P,J], -log p_base of the targets of ``nll_mix``; no gradient is taken through it.
        nll_mix: [B,P,N,J], -log p_mix.
        weight: [B,P,N,J], mixing weight on the thought.
        logprob: [B,P,N,T], of the sampled tokens at the policy temperature; 0 past the end of a thought.
    """

    text: Tensor
    nll_base: Tensor
    nll_compared: Tensor
    nll_mix: Tensor
    weight: Tensor
    logprob: Tensor


class Mixture(NamedTuple):
    """log p_mix = sum over the terms of coefficient * log p(state).

    Attributes:
        terms: (coefficient [...,1], state fp32 [...,D]); one where logits mix, since the output layer is linear.
        weight: fp32 [...], mixing weight on the thought.
    """

    terms: list[tuple[Tensor, Tensor]]
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Thinker:
    """The parts of a ``QuietStar`` that a pass with thoughts needs, and the steps of one, for code of your own.

    ``qs.thinker`` makes one; it shares every weight. Its other types are in ``quietstar.packed``.

    Attributes:
        model: the language model.
        lm_head: its output layer with factor and soft cap.
        mixing_head: the mixing head.
        start_embedding, end_embedding: Parameter [D]; ``start`` and ``end`` are what the decoder sees.
        config: the ``ThoughtConfig``.
    """

    model: PreTrainedModel
    lm_head: LMHead
    mixing_head: MixingHead
    start_embedding: Tensor
    end_embedding: Tensor
    config: ThoughtConfig

    @property
    def device(self) -> torch.device:
        return self.start_embedding.device

    @property
    def start(self) -> Tensor:
        """[D], the start vector as the decoder sees it, in its dtype."""
        return self._vector(self.start_embedding)

    @property
    def end(self) -> Tensor:
        """[D], the end vector, likewise."""
        return self._vector(self.end_embedding)

    def _vector(self, parameter: Tensor) -> Tensor:
        return (self.config.embedding_scale * parameter).to(embeddings(self.model).weight.dtype)

    def _check_states(self, name: str, states: Tensor, letters: str = "...,D", **sizes: int) -> None:
        sizes["D"] = self.lm_head.linear.in_features
        tensor(name, states, letters, sizes, self.device, FLOATS)

    def _check_thoughts(self, thought: Tensor, thought_lengths: Tensor | None, **sizes: int) -> None:
        self._check_states("thought", thought, "B,P,N,S,D", S=self.config.rows, **sizes)
        if thought_lengths is not None:
            sizes = dict(zip("BPN", thought.shape, strict=False))
            tensor("thought_lengths", thought_lengths, "B,P,N", sizes, self.device, INTEGERS)
            if self.device.type == "cpu":
                checks.check_range("thought_lengths", thought_lengths, self.config.thought_tokens, "T")

    def _check_targets(self, name: str, targets: Tensor, shape: torch.Size) -> None:
        """Ids of the vocabulary, or ignored ones; read on a CPU alone, likewise."""
        sizes = {f"n{i}": size for i, size in enumerate(shape)}
        tensor(name, targets, ",".join(sizes), sizes, self.device, INTEGERS)
        if self.device.type == "cpu":
            checks.check_ids(name, targets.masked_fill(targets == IGNORED, 0), self.lm_head.linear.out_features)

    def layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        document_ids: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> ThoughtLayout:
        """The packed sequence of the text and its thoughts; arguments and errors are those of ``QuietStar.forward``."""
        checks.check_text(input_ids, attention_mask, self.config, embeddings(self.model))
        layout = checks.make_layout(input_ids, attention_mask, anchors, document_ids, self.config)
        checks.check_positions(self.model, layout)
        return checks.with_lengths(layout, thought_lengths, self.config)

    def thought_rows(self, layout: ThoughtLayout, input_ids: Tensor, thought_ids: Tensor) -> Tensor:
        """Embeddings [B,R,D] of start, sampled tokens, end and the text that follows, whatever the lengths."""
        checks.check_packed(layout, input_ids, self.config, embeddings(self.model), thought_ids)
        pad, T = checks.pad_id(self.model.config), self.config.thought_tokens
        tokens = layout.token_ids(input_ids, thought_ids, pad, pad, pad)[:, layout.L :]
        tokens = tokens.unflatten(1, (layout.P, layout.N, layout.S))
        end = (layout.length.long() - self.config.lookahead).clamp(min=1)[..., None]  # [B,P,N,1]
        s = torch.arange(layout.S, device=tokens.device)
        # A shorter thought leaves out its last sampled tokens.
        tokens = tokens.gather(3, torch.where(s < end, s, s + T + 1 - end).clamp(max=layout.S - 1))
        if self.device.type == "cpu":  # elsewhere this would wait for the device
            checks.check_ids("thought_ids", tokens, len(embeddings(self.model).weight))
        embeds = torch.where((s == end)[..., None], self.end, embeddings(self.model)(tokens))
        return torch.where((s == 0)[:, None], self.start, embeds).flatten(1, 3)

    def states(self, layout: ThoughtLayout, input_ids: Tensor, thought_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One packed forward: last hidden states of the text [B,L,D] and of the thought rows [B,P,N,S,D]."""
        rows = self.thought_rows(layout, input_ids, thought_ids)  # checks the arguments
        embeds = torch.cat([embeddings(self.model)(input_ids), rows], 1)
        return layout.split(decode_rows(self.model, embeds, layout.position_ids(), PackedPass(layout)))

    def base_states(self, layout: ThoughtLayout, text: Tensor) -> Tensor:
        """Text states [B,P,J,D] at the positions that predict the targets of each anchor."""
        checks.check_layout(layout, self.config)
        self._check_states("text", text, "B,L,D", B=layout.B, L=layout.L)
        steps = torch.arange(self.config.lookahead, device=text.device)
        index = (layout.anchor.long()[:, :, None] + steps).clamp(0, layout.L - 1)  # [B,P,J]
        return text[torch.arange(layout.B, device=text.device)[:, None, None], index]

    def end_states(self, thought: Tensor, thought_lengths: Tensor | None) -> Tensor:
        """States [B,P,N,J,D] of the end rows and those after them, from all rows [B,P,N,S,D]."""
        self._check_thoughts(thought, thought_lengths)
        if thought_lengths is None:
            return thought[:, :, :, self.config.thought_tokens + 1 :]
        steps = torch.arange(1, self.config.lookahead + 1, device=thought.device)
        rows = thought_lengths.long()[..., None] + steps
        return thought.gather(3, rows[..., None].expand(*rows.shape, thought.shape[-1]))

    def thought_logprob(self, thought: Tensor, thought_ids: Tensor, thought_lengths: Tensor | None) -> Tensor:
        """Log-probabilities [B,P,N,T] of the sampled tokens at the policy temperature; 0 past the end of a thought."""
        T = self.config.thought_tokens
        self._check_thoughts(thought, thought_lengths)
        tensor("thought_ids", thought_ids, "B,P,N,T", dict(zip("BPN", thought.shape, strict=False)) | {"T": T}, self.device)
        if thought_lengths is not None:
            thought_ids = torch.where(checks.sampled(thought_lengths, T), thought_ids, IGNORED)
        self._check_targets("thought_ids", thought_ids, thought_ids.shape)
        return self.lm_head.logprob(thought[:, :, :, :T], thought_ids, self.config.policy_temperature, self.config.banned)

    def mix(self, h_base: Tensor, h_thought: Tensor) -> Mixture:
        """How the predictions of two states combine.

        Args:
            h_base: [...,D], of the text; may have size 1 where ``h_thought`` has N.
            h_thought: [...,D], of thoughts.
        """
        self._check_states("h_thought", h_thought)
        self._check_states("h_base", h_base)
        pairs = zip(reversed(h_base.shape), reversed(h_thought.shape), strict=False)
        if h_base.ndim > h_thought.ndim or any(size not in (1, other) for size, other in pairs):
            raise ValueError(f"h_base must expand to h_thought {list(h_thought.shape)}, got {list(h_base.shape)}")
        h_thought = h_thought.float()
        h_base = h_base.float().expand_as(h_thought)
        weight = self.mixing_head.score(h_base, h_thought)
        if self.config.mixing == "logits":
            return Mixture([(torch.ones_like(weight), (1 - weight) * h_base + weight * h_thought)], weight[..., 0])
        weight = torch.sigmoid(weight)
        return Mixture([(1 - weight, h_base), (weight, h_thought)], weight[..., 0])

    def mixed_nll(self, mixture: Mixture, targets: Tensor, predicting: Tensor, base_targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of ``base_targets`` [...] under the states ``predicting`` [...,D], and -log p_mix of ``targets`` [...]."""
        (coefficient, state), *others = instance("mixture", mixture, Mixture).terms
        self._check_states("predicting", predicting)
        self._check_targets("targets", targets, state.shape[:-1])
        self._check_targets("base_targets", base_targets, predicting.shape[:-1])
        # One call for both: with a weight of 0 they must agree to the last bit, since policy_weight multiplies the difference.
        hidden = torch.cat([predicting.flatten(0, -2).float(), state.flatten(0, -2)])
        logprob = self.lm_head.logprob(hidden, torch.cat([base_targets.flatten(), targets.flatten()]))
        base, mixed = logprob.split([base_targets.numel(), targets.numel()])
        mixed = coefficient[..., 0] * mixed.view_as(targets)
        for coefficient, state in others:
            mixed = mixed + coefficient[..., 0] * self.lm_head.logprob(state, targets)
        return -base.view_as(base_targets), -mixed

    def logprobs(self, hidden: Tensor) -> Tensor:
        """fp32 log-probabilities [...,V] of the next token under states [...,D]."""
        return self.logits(hidden).log_softmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [...,V] of states [...,D]."""
        self._check_states("hidden", hidden)
        return self.lm_head.logits(hidden.to(self.lm_head.linear.weight.dtype)).float()

    def mixed_logprobs(self, h_base: Tensor, h_thought: Tensor) -> Tensor:
        """log p_mix [...,V] from states [...,D], as in the loss: where log-probabilities mix, they don't add up to 1."""
        first, *others = [coefficient * self.logprobs(state) for coefficient, state in self.mix(h_base, h_thought).terms]
        return sum(others, first)

    def predict(self, inputs: PackedInputs, text: Tensor, thought: Tensor) -> Predictions:
        """What the objective needs, from the states of ``states``."""
        layout, lengths, targets = instance("inputs", inputs, PackedInputs).layout, inputs.thought_lengths, inputs.targets
        self._check_thoughts(thought, lengths, B=layout.B, P=layout.P, N=layout.N)
        ahead = self.end_states(thought, lengths)
        mixture = self.mix(self.base_states(layout, text)[:, :, None], ahead)
        nll_base, nll_mix = self.mixed_nll(mixture, targets.mix, text[:, :-1], targets.base)
        compared = at_anchors(nll_base, layout, self.config.lookahead)
        logprob = self.thought_logprob(thought, inputs.thought_ids, lengths)
        return Predictions(text, nll_base, compared, nll_mix, mixture.weight, logprob)
