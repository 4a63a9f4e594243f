"""Where to think: which positions of a text become anchors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.modules import dropout_off, embeddings
from quietstar.texts import Texts
from quietstar.thinking.forward import Thinker
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.philox import draw_words

# A gate stays this far from 0 and 1, so that it always explores both.
EXPLORATION = 0.02
# The n of the counters of an anchor choice; thoughts have smaller numbers.
CHOICE = 65535
LOGITS = 2**22


class Gate(nn.Module):
    """The probability to think at a position, from its text hidden state: g = 0.02 + 0.96 sigmoid(w h + b)."""

    def __init__(self, width: int, share: float, device: torch.device):
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self.linear.weight)
        inner = min(max((share - EXPLORATION) / (1 - 2 * EXPLORATION), 1e-3), 1 - 1e-3)
        nn.init.constant_(self.linear.bias, torch.logit(torch.tensor(inner)).item())

    def forward(self, hidden: Tensor) -> Tensor:
        """fp32 [...] from hidden [...,D], which gets no gradient."""
        with torch.autocast(hidden.device.type, enabled=False):
            score = self.linear(hidden.detach().to(self.linear.weight.dtype))[..., 0].float()
        return EXPLORATION + (1 - 2 * EXPLORATION) * torch.sigmoid(score)

    def at_anchors(self, text: Tensor, layout: ThoughtLayout) -> Tensor:
        """[B,P], the probability at each anchor, from the text's hidden states [B,L,D]."""
        rows = torch.arange(layout.B, device=text.device)[:, None]
        return self(text[rows, layout.anchor.long().clamp(min=0)])


@dataclass
class Candidates:
    """What an anchor choice may look at; hidden states and random numbers are computed on first use.

    Attributes:
        texts: with a thought at every position. They may be on the CPU whatever the model is on: then only a choice by entropy
            or a gate waits for a GPU.
        training: a gate is sampled from in training, and opens above 0.5 in evaluation.
        tokenizer: only needed for the ends of sentences.
        eligible: bool [B,L], text positions whose next token is text of the same document; where the thought alone predicts,
            its next J tokens.
        position: int64 [B,L], counted from the document's first token.
    """

    thinker: Thinker
    gate: Gate | None
    texts: Texts
    seed: int
    training: bool
    tokenizer: PreTrainedTokenizerBase | None = None

    @cached_property
    def eligible(self) -> Tensor:
        layout, config = self.texts.layout, self.thinker.config
        on, lo = layout.live()[:, :, 0, 0], layout.lo
        J = config.lookahead if config.mixing == "none" else 1
        t = torch.arange(max(layout.L - J, 0), device=lo.device)
        return nn.functional.pad(on[:, :-J] & on[:, J:] & (lo[:, J:] <= t), (0, min(J, layout.L)))

    @property
    def position(self) -> Tensor:
        return self.texts.layout.text_position_ids()

    @property
    def uniform(self) -> Tensor:
        """[B,L] in [0, 1), fixed by seed, sequence id and position."""
        zeros = torch.zeros_like(self.position)
        counters = torch.stack([self.texts.sequence_ids, self.position, zeros + CHOICE, zeros], -1).int()
        words, _ = draw_words(counters.flatten(0, 1), zeros.new_zeros(1), self.seed)
        return words.view(zeros.shape).double() / 2**32

    @property
    def hidden(self) -> Tensor:
        """[B,L,D], last hidden states of the text, on the model's device."""
        model, text = self.thinker.model, self.texts.layout.text_only().to(self.thinker.device)
        embeds = embeddings(model)(self.texts.input_ids.to(text.device))
        with dropout_off(model):
            return decode_rows(model, embeds, text.position_ids(), PackedPass(text))

    @property
    def entropy(self) -> Tensor:
        """[B,L], of the base prediction, nats; logits are computed for some rows at a time."""
        head, hidden = self.thinker.lm_head, self.hidden
        rows = hidden.flatten(0, 1).to(head.linear.weight.dtype).split(max(1, LOGITS // head.linear.out_features))
        values = [torch.special.entr(head.logits(part).float().softmax(-1)).sum(-1) for part in rows]
        return torch.cat(values).view(hidden.shape[:2]).to(self.texts.device)


def _top(candidates: Candidates, score: Tensor) -> Tensor:
    """In each row, the eligible positions with the highest scores, earlier ones on ties.

    They are ``anchor_count``, or the ``anchor_share`` of all, rounded up.
    """
    config = candidates.thinker.config
    wanted = (candidates.eligible.sum(1, keepdim=True).double() * config.anchor_share).ceil()
    return _highest(candidates.eligible, score, config.anchor_count or wanted)


def _highest(eligible: Tensor, score: Tensor, wanted: int | Tensor) -> Tensor:
    order = torch.where(eligible, score.double(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < wanted) & eligible


def _sentences(candidates: Candidates) -> Tensor:
    """The ends of sentences, ``anchor_count`` of them at random."""
    closes, opens = _sentence_tokens(candidates.tokenizer, len(embeddings(candidates.thinker.model).weight))
    ids = candidates.texts.input_ids.cpu()
    ends = nn.functional.pad(closes[ids[:, :-1]] & opens[ids[:, 1:]], (0, 1)).to(candidates.eligible.device)
    ends = ends & candidates.eligible
    count = candidates.thinker.config.anchor_count
    return _highest(ends, candidates.uniform, count) if count else ends


@lru_cache(2)
def _sentence_tokens(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """bool [V]: tokens with which a sentence ends, and those that can follow one: with a space or a line before them."""
    if tokenizer is None:
        raise ValueError(
            "anchors='sentences' needs a tokenizer, which knows where sentences end: QuietStar(model, config, tokenizer)"
        )
    first = tokenizer.get_vocab().get("a", 0)  # some decoders drop a first space
    start = len(tokenizer.decode([first]))
    texts = tokenizer.batch_decode([[first, i] for i in range(min(vocabulary, len(tokenizer)))])
    texts = [text[start:] for text in texts] + [""] * (vocabulary - len(texts))
    closes = [re.search(r"[.!?…。！？][\"'”’)\]]*\s*$", text) is not None for text in texts]
    return torch.tensor(closes), torch.tensor([text[:1].isspace() for text in texts])


def _gate(candidates: Candidates) -> Tensor:
    """Sampled in training, above 0.5 in evaluation."""
    assert candidates.gate is not None
    opens = candidates.gate(candidates.hidden).to(candidates.texts.device)
    return candidates.eligible & ((candidates.uniform if candidates.training else 0.5) < opens)


# Which positions of a text think, bool [B,L].
CHOICES: dict[str, Callable[[Candidates], Tensor]] = {
    "all": lambda candidates: candidates.eligible,
    "random": lambda candidates: _top(candidates, candidates.uniform),
    "entropy": lambda candidates: _top(candidates, candidates.entropy),
    "sentences": _sentences,
    "every": lambda candidates: (
        candidates.eligible & ((candidates.position + 1) % candidates.thinker.config.anchor_stride == 0)
    ),
    "gate": _gate,
}


@torch.no_grad()
def choose(candidates: Candidates) -> Tensor:
    """int64 [B,P], the anchors that the config's ``anchors`` chooses, ascending, -1 in unused places; P is at least 1."""
    chosen, L = CHOICES[candidates.thinker.config.anchors](candidates), candidates.texts.layout.L
    places = torch.where(chosen, torch.arange(L, device=chosen.device), L).sort(1).values
    places = places[:, : max(1, int(chosen.sum(1).max()))]
    return places.masked_fill(places == L, -1)
