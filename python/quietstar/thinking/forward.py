"""The differentiable pass: states of a text and its thoughts, mixed predictions, log-probabilities (sections 4.2, 4.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from quietstar import checks
from quietstar.config import ThoughtConfig
from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import embeddings, is_sharded
from quietstar.objective import IGNORED, at_places, places_ahead, sampled
from quietstar.texts import RowTable, Tables, check_texts, with_lengths
from quietstar.thinking.text_thoughts import Marks, WrittenRows
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.reference import wide


class MixingHead(nn.Sequential):
    """Linear(2D,D), ReLU, Linear(D,D), ReLU, Linear(D,1), whose last layer starts at zero; its input is [text; thought]."""

    def __init__(self, width: int, device: torch.device | None = None):
        last = nn.Linear(width, 1, bias=False, device=device)
        nn.init.zeros_(last.weight)
        hidden = nn.Linear(2 * width, width, device=device), nn.ReLU(), nn.Linear(width, width, device=device), nn.ReLU()
        super().__init__(*hidden, last)

    def score(self, both: Tensor) -> Tensor:
        """fp32 (fp64 from fp64) [...,1] from two states [...,2D], in the head's own dtype whatever autocast says."""
        with torch.autocast(both.device.type, enabled=False):
            return wide(self(both.to(next(self.parameters()).dtype)))


class PackedInputs(NamedTuple):
    """A text, its thoughts and what is predicted."""

    layout: ThoughtLayout
    input_ids: Tensor  # int64 [B,L]
    thought_ids: Tensor  # int64 [B,P,N,T]
    thought_lengths: Tensor | None  # int64 [B,P,N]; None where all thoughts have T tokens
    tables: Tables

    def select(self, places: slice) -> PackedInputs:
        """Those of some of the anchors."""
        return PackedInputs(
            self.layout.select(places),
            self.input_ids,
            self.thought_ids[:, places],
            None if self.thought_lengths is None else self.thought_lengths[:, places],
            self.tables.select(places),
        )

    def without(self, left_out: Tensor) -> PackedInputs:
        """The same anchors; those of ``left_out`` bool [B,P] have no thoughts and predict nothing."""
        layout = replace(self.layout, length=self.layout.length.masked_fill(left_out[..., None], 0))
        return self._replace(layout=layout, tables=self.tables.without(left_out))


class Predictions(NamedTuple):
    """What the objective is computed from, fp32, nats; 0 where a target does not count."""

    text: Tensor  # [B,L,D], last hidden states of the text
    nll_base: Tensor  # [B,L-1], -log p_base of text token t+1
    nll_compared: Tensor  # [B,P,J], -log p_base of the targets of ``nll_mix``; no gradient is taken through it
    nll_mix: Tensor  # [B,P,N,J], -log p_mix
    weight: Tensor  # [B,P,N,J], mixing weight on the thought
    logprob: Tensor  # [B,P,N,T], of the sampled tokens at the policy temperature; 0 past the end of a thought


def _times(coefficient: Tensor | None, x: Tensor) -> Tensor:
    return x if coefficient is None else coefficient * x


class Mixture(NamedTuple):
    """log p_mix = sum over the terms of coefficient * log p(state).

    Attributes:
        terms: (coefficient [...,1], state fp32 [...,D]); one where logits mix, since the output layer is linear, whose
            coefficient is 1, written as None.
        weight: fp32 [...], mixing weight on the thought.
    """

    terms: list[tuple[Tensor | None, Tensor]]
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Thinker:
    """The parts of a ``QuietStar`` that a pass with thoughts needs, and the steps of one, for code of your own.

    ``qs.thinker`` makes one; it shares every weight. Its other types are in ``quietstar.thinking.forward``.

    Attributes:
        model: the language model.
        lm_head: its output layer with factor and soft cap.
        mixing_head: the mixing head.
        start_embedding, end_embedding: Parameter [D]; ``start`` and ``end`` are what the decoder sees.
        config: the ``ThoughtConfig``.
        marks: the tokens around a thought that is text; None where it stands between vectors.
    """

    model: PreTrainedModel
    lm_head: LMHead
    mixing_head: MixingHead
    start_embedding: Tensor
    end_embedding: Tensor
    config: ThoughtConfig
    marks: Marks | None = None

    @property
    def device(self) -> torch.device:
        return self.start_embedding.device

    @property
    def start(self) -> Tensor:
        """[D], the start vector as the decoder sees it, in its dtype."""
        return self._vector(self.start_embedding)

    @property
    def end(self) -> Tensor:
        """[D], the end vector as the decoder sees it, in its dtype."""
        return self._vector(self.end_embedding)

    def _vector(self, parameter: Tensor) -> Tensor:
        return (self.config.embedding_scale * parameter).to(embeddings(self.model).weight.dtype)

    def predicting(self, thoughts: int, lookahead: int) -> Thinker:
        """The same for predictions alone, with so many thoughts and tokens ahead, whatever those of the training."""
        alone = replace(self.config, reward="gain", advantage="relu", base_model="current", kl_weight=0.0)
        return replace(self, config=replace(alone, thoughts=thoughts, lookahead=lookahead))

    def tables(self, layout: ThoughtLayout, input_ids: Tensor, labels: Tensor) -> Tables:
        """What ``predict`` reads of a text and a layout."""
        return Tables.of(layout, input_ids, labels, self.config, checks.pad_id(self.model.config))

    @property
    def most_rows(self) -> int:
        """Rows of the longest thought: vectors take a row each, strings as many as they have tokens."""
        return self.config.rows + (0 if self.marks is None else len(self.marks.start) + len(self.marks.end) - 2)

    def layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        document_ids: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> ThoughtLayout:
        """The packed sequence of the text and its thoughts; arguments and errors are those of ``QuietStar.forward``.

        Their values are checked here: on the CPU, which they may be on whatever the model is on, by reading them; on a GPU by
        an assertion that nothing waits for. The layout is on their device.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "anchors": anchors, "document_ids": document_ids}
        layout = check_texts(given, self.model, self.config, self.most_rows).layout
        return with_lengths(layout, thought_lengths, self.config.lookahead)

    def thought_rows(self, table: RowTable, thought_ids: Tensor) -> Tensor:
        """Embeddings [B,R,D] of start, sampled tokens, end and the text that follows, whatever the lengths."""
        text = table.text.expand(-1, -1, thought_ids.shape[2], -1)
        tokens = torch.cat([text[..., :1], thought_ids, text], 3)
        tokens = tokens if table.place is None else tokens.gather(3, table.place)
        start, end = self._vector(torch.stack([self.start_embedding, self.end_embedding]))
        embeds = torch.where(table.is_end, end, embeddings(self.model)(tokens))
        return torch.where(table.is_start, start, embeds).flatten(1, 3)

    def states(self, layout: ThoughtLayout, input_ids: Tensor, thought_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One packed forward: last hidden states of the text [B,L,D] and of the thought rows [B,P,N,S,D].

        Raises ValueError where thoughts are text, whose rows have another order.
        """
        if self.marks is not None:
            raise ValueError(f"states: thoughts must stand between vectors, got thought_start={self.config.thought_start!r}")
        rows = self.rows(layout, input_ids, thought_ids, None)
        return layout.split(self._packed_forward(layout, input_ids, rows.embeds))

    def _packed_forward(self, layout: ThoughtLayout, input_ids: Tensor, rows: Tensor) -> Tensor:
        embeds = torch.cat([embeddings(self.model)(input_ids), rows], 1)
        return decode_rows(self.model, embeds, layout.position_ids(), PackedPass(layout))

    def rows(
        self,
        layout: ThoughtLayout,
        input_ids: Tensor,
        thought_ids: Tensor,
        lengths: Tensor | None,
        table: RowTable | None = None,
    ) -> GridRows | TextRows:
        """The thought rows, in the layout's own order; ``table`` is that of the layout, where it has been made."""
        if self.marks is None:
            if table is None:
                table = RowTable.of(layout, input_ids, self.config.lookahead, checks.pad_id(self.model.config))
            return GridRows(self, layout, self.thought_rows(table, thought_ids), thought_ids, lengths)
        written = WrittenRows.of(layout, input_ids, thought_ids, self.marks, self.config.lookahead)
        return TextRows(self, written.layout, embeddings(self.model)(written.ids), written)

    def base_states(self, layout: ThoughtLayout, text: Tensor) -> Tensor:
        """Text states [B,P,J,D] at the positions that predict the targets of each anchor."""
        places = places_ahead(layout, self.config.lookahead, layout.L)
        return text[torch.arange(layout.B, device=text.device)[:, None, None], places]

    def end_states(self, thought: Tensor, thought_lengths: Tensor | None) -> Tensor:
        """States [B,P,N,J,D] of the end rows and those after them, from all rows [B,P,N,S,D]."""
        if thought_lengths is None:
            return thought[:, :, :, self.config.thought_tokens + 1 :]
        steps = torch.arange(1, self.config.lookahead + 1, device=thought.device)
        rows = thought_lengths.long()[..., None] + steps
        return thought.gather(3, rows[..., None].expand(*rows.shape, thought.shape[-1]))

    def thought_logprob(self, thought: Tensor, thought_ids: Tensor, thought_lengths: Tensor | None) -> Tensor:
        """Log-probabilities [B,P,N,T] of the sampled tokens at the policy temperature; 0 past the end of a thought."""
        T = self.config.thought_tokens
        if thought_lengths is not None:
            thought_ids = torch.where(sampled(thought_lengths, T), thought_ids, IGNORED)
        return self.lm_head.logprob(thought[:, :, :, :T], thought_ids, self.config.policy_temperature, self.config.banned)

    def mix(self, h_base: Tensor, h_thought: Tensor) -> Mixture:
        """How the predictions of two states combine.

        Args:
            h_base: [...,D], of the text; may have size 1 where ``h_thought`` has N.
            h_thought: [...,D], of thoughts.
        """
        if self.config.mixing == "none":
            h_thought = wide(h_thought)
            weight = h_thought.new_ones(*h_thought.shape[:-1], 1)
            return Mixture([(None, h_thought)], weight[..., 0])
        both = wide(torch.cat([h_base.expand_as(h_thought), h_thought], -1))
        weight = self.mixing_head.score(both).to(both.dtype)
        h_base, h_thought = both.chunk(2, -1)
        if self.config.mixing == "logits":
            return Mixture([(None, torch.lerp(h_base, h_thought, weight))], weight[..., 0])
        weight = torch.sigmoid(weight)
        return Mixture([(1 - weight, h_base), (weight, h_thought)], weight[..., 0])

    def mixed_nll(self, mixture: Mixture, predicting: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p [...] under the states ``predicting`` [...,D], and -log p_mix of the mixture's [...].

        Args:
            targets: int64, those of both, one after another.
        """
        (coefficient, state), *others = mixture.terms
        shape, rows = state.shape[:-1], state.shape[:-1].numel()
        # One call for both: with a weight of 0 they must agree to the last bit, since policy_weight multiplies the difference.
        dtype = self.lm_head.linear.weight.dtype
        dtype = dtype if dtype == predicting.dtype else state.dtype  # the head would cast to its own
        # Text by text, which takes no copy of those states of each that predict.
        hidden = torch.cat([*predicting.flatten(1, -2).to(dtype), state.flatten(0, -2).to(dtype)])
        nll = -self.lm_head.logprob(hidden, targets)
        base, mixed = nll.split([len(targets) - rows, rows])
        mixed = _times(coefficient, mixed.view(*shape, 1))
        for coefficient, state in others:
            logprob = self.lm_head.logprob(state, targets[len(targets) - rows :].view(shape))
            mixed = mixed - _times(coefficient, logprob[..., None])
        return base.view(predicting.shape[:-1]), mixed.squeeze(-1)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """fp32 log-probabilities [...,V] of the next token under states [...,D]."""
        return self.logits(hidden).log_softmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [...,V] of states [...,D]; fp64 for fp64 models."""
        return wide(self.lm_head.logits(hidden.to(self.lm_head.linear.weight.dtype)))

    def mixed_logprobs(self, h_base: Tensor, h_thought: Tensor) -> Tensor:
        """log p_mix [...,V] from states [...,D], as in the loss: where log-probabilities mix, they don't add up to 1."""
        terms = self.mix(h_base, h_thought).terms
        first, *others = [_times(coefficient, self.logprobs(state)) for coefficient, state in terms]
        return sum(others, first)

    def packed_states(
        self,
        layout: ThoughtLayout,
        input_ids: Tensor,
        thought_ids: Tensor,
        lengths: Tensor | None,
        table: RowTable | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One packed forward, whichever rows thoughts have; ``table`` as in ``rows``.

        Returns last hidden states of the text [B,L,D], those that predict the text after each thought [B,P,N,J,D], and the
        log-probabilities of the sampled tokens [B,P,N,T].
        """
        if self.marks is not None and layout.B > 1 and layout.device.type == "cpu" and not is_sharded(self.model):
            # Text by text nothing is padded to the longest, and the allocator keeps memory that it hands back if it is large.
            # Processes that share weights may have different numbers of texts, but must run the model equally often.
            each = []
            for b in (slice(b, b + 1) for b in range(layout.B)):
                own = replace(layout, anchor=layout.anchor[b], lo=layout.lo[b], length=layout.length[b])
                each.append(self.packed_states(own, input_ids[b], thought_ids[b], None))
            text, ahead, logprob = (torch.cat(parts) for parts in zip(*each, strict=True))
            return text, ahead, logprob
        rows = self.rows(layout, input_ids, thought_ids, lengths, table)
        hidden = self._packed_forward(rows.layout, input_ids, rows.embeds)
        text, thoughts = hidden.split([rows.layout.L, rows.layout.R], 1)
        ahead, before = rows.split(thoughts)
        return text, ahead, rows.logprob(before)

    def predict(self, inputs: PackedInputs, text: Tensor, ahead: Tensor, logprob: Tensor) -> Predictions:
        """What the objective needs, from the results of ``packed_states``."""
        tables = inputs.tables
        mixture = self.mix(text[tables.text, tables.places][:, :, None], ahead)
        nll_base, nll_mix = self.mixed_nll(mixture, text[:, :-1], tables.predicted)
        compared = at_places(nll_base.detach(), tables.scored)
        return Predictions(text, nll_base, compared, nll_mix, mixture.weight, logprob)


@dataclass(frozen=True, eq=False)
class GridRows:
    """The rows of thoughts between vectors, S for each, and where the states of a packed forward go."""

    thinker: Thinker
    layout: ThoughtLayout
    embeds: Tensor  # [B,R,D]
    thought_ids: Tensor
    lengths: Tensor | None

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """From the states of the rows those that predict the text after the anchor [B,P,N,J,D], and what ``logprob`` takes."""
        T, S = self.thinker.config.thought_tokens, self.layout.S
        thought = hidden.unflatten(1, (self.layout.P, self.layout.N, S))
        # Not two slices, whose backwards would each fill the whole with zeros.
        before, _, ahead = thought.split([T, 1, S - T - 1], 3)
        return ahead if self.lengths is None else self.thinker.end_states(thought, self.lengths), before

    def logprob(self, before: Tensor) -> Tensor:
        """[B,P,N,T], of the sampled tokens at the policy temperature."""
        return self.thinker.thought_logprob(before, self.thought_ids, self.lengths)


@dataclass(frozen=True, eq=False)
class TextRows:
    """The same between strings: as many rows as a thought has."""

    thinker: Thinker
    layout: ThoughtLayout
    embeds: Tensor
    written: WrittenRows

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ahead = self.written.ahead
        if not hidden.shape[1]:  # no thought at all; as part of the graph, though
            return hidden.sum() + hidden.new_zeros((*ahead.shape, hidden.shape[-1])), hidden
        return hidden[self._text, ahead], hidden

    def logprob(self, hidden: Tensor) -> Tensor:
        written, on, temperature = self.written, self.written.on, self.thinker.config.policy_temperature
        states = hidden[self._text.expand_as(on)[on], written.predicts[on]]
        values = self.thinker.lm_head.logprob(states, written.thought_ids[on], temperature)
        return values.new_zeros(on.shape).masked_scatter(on, values)

    @property
    def _text(self) -> Tensor:
        """[B,1,1,1], the number of each text."""
        return torch.arange(self.layout.B, device=self.layout.device)[:, None, None, None]


@dataclass
class QuietStarOutput(ModelOutput):
    """Output of ``QuietStar.forward``. All fp32, fp64 for fp64 models; undefined positions hold 0.

    Attributes:
        loss: loss_ce + policy_weight * policy_loss, plus the loss of a gate in training.
        loss_ce: base_weight * mean base + mix_weight * mean mixed cross entropy, nats.
        policy_loss: the terms of the policy, before ``policy_weight``.
        nll_base: [B,L-1], -log p_base of text token t+1, nats.
        nll_mix: [B,P,N,J], -log p_mix of text token anchor+j+1, nats.
        weight: [B,P,N,J], mixing weight on the thought.
        reward: [B,P,N], nats, no gradient.
        advantage: [B,P,N], no gradient.
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N], sampled tokens of each thought; None where all have T.
        logprob: [B,P,N,T], of the thoughts at the policy temperature, no gradient; ``old_logprob`` for further updates.
        base_logprob: [B,P,N,T], of the thoughts as the base model's continuation of the text; None where kl_weight is 0.
        anchors: integer [B,P], the positions that think; None for all.
        dead: bool [B,P], rewarded anchors whose thoughts all earn the same, so that nothing is learned from them.
        leaks: bool [B,P,N], thoughts that have the next four tokens of the text.
    """

    loss: Tensor = None  # type: ignore[assignment]
    loss_ce: Tensor = None  # type: ignore[assignment]
    policy_loss: Tensor = None  # type: ignore[assignment]
    nll_base: Tensor = None  # type: ignore[assignment]
    nll_mix: Tensor = None  # type: ignore[assignment]
    weight: Tensor = None  # type: ignore[assignment]
    reward: Tensor = None  # type: ignore[assignment]
    advantage: Tensor = None  # type: ignore[assignment]
    thought_ids: Tensor = None  # type: ignore[assignment]
    thought_lengths: Tensor | None = None
    logprob: Tensor = None  # type: ignore[assignment]
    base_logprob: Tensor | None = None
    anchors: Tensor | None = None
    dead: Tensor = None  # type: ignore[assignment]
    leaks: Tensor = None  # type: ignore[assignment]
