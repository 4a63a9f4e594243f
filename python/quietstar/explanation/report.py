"""What thinking did to each token of a text: surprise without and with thoughts, the thoughts, the likeliest tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar import checks
from quietstar.evaluation.intervals import mean_interval
from quietstar.evaluation.scoring import LOGITS, ROWS
from quietstar.explanation.page import render
from quietstar.explanation.tokens import SAME, Alternative, ExplainedThought, ExplainedToken, text_pieces, token_text
from quietstar.files.writing import write_whole
from quietstar.hf.modules import check_whole, dropout_off, not_finite, unwrapped
from quietstar.model import QuietStar
from quietstar.objective import leaks, sampled
from quietstar.thinking.forward import PackedInputs, Thinker
from quietstar.thinking.rollout import Thoughts
from quietstar_kernels.checks import file_path, flag, instance, unicode

FORMAT = 2
LOSSES, GAINS = ("base", "mixed", "another"), ("gain", "mixing", "content")
TOP = 5  # likeliest tokens shown


@dataclass(frozen=True)
class Report:
    """What ``explain`` returns.

    Attributes:
        model: class, model_type, name (where it was loaded from, may be empty), parameters, dtype.
        settings: preset, mixing, thoughts (of each token), thought_tokens, seed (None: greedy thoughts), another (the other
            text; None: this one, half its length further on).
        tokens: every token of the text.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    tokens: list[ExplainedToken]

    @property
    def summary(self) -> dict[str, float | int]:
        """Means over the predicted tokens, nats.

        Keys: tokens, how many were predicted; base, mixed, another, gain, mixing and content, their means; gain_low, gain_high,
        mixing_low, ..., the 95 % intervals of the gains, as if tokens were independent; helped, the share of tokens whose gain
        and content are both 0.05 or more; hurt, the share with a gain below -0.05; leaks, the share of thoughts that have the
        next four tokens of the text.
        """
        predicted = self.tokens[1:]
        summary: dict[str, float | int] = {"tokens": len(predicted)}
        for name in (*LOSSES, *GAINS):
            summary[name], low, high = mean_interval([getattr(token, name) for token in predicted])
            assert low is not None and high is not None  # a text has three tokens or more
            summary |= {f"{name}_low": low, f"{name}_high": high} if name in GAINS else {}
        effects = [token.effect or 0.0 for token in predicted]
        shares = {"helped": [x >= SAME for x in effects], "hurt": [x < -SAME for x in effects]}
        shares["leaks"] = [thought.leaks for token in predicted for thought in token.thoughts] or [False]
        return summary | {name: fmean(x) for name, x in shares.items()}

    @property
    def html(self) -> str:
        """A self-contained page: no network, no other file."""
        return render(self.model, self.settings, self.summary, self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """format, model, settings, summary and tokens as plain lists, dicts, numbers and strings, under the names above."""
        own = asdict(self)
        return {"format": FORMAT, "model": own["model"], "settings": own["settings"], "summary": self.summary} | own

    def save(self, path: str | os.PathLike) -> None:
        """Write the page, or ``to_dict()`` where the name ends in .json; atomically, so that no partial file is left."""
        file_path("path", path)
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n" if Path(path).suffix == ".json" else self.html)


@torch.no_grad()
def explain(
    qs: QuietStar, text: str, seed: int | None = None, another: str | None = None, add_special_tokens: bool = True
) -> Report:
    """Report what thinking does to each token: ``.html``, ``.to_dict()``, ``.save(path)``, ``.summary``, ``.tokens``.

    Args:
        text: at least 3 tokens of the tokenizer that ``qs`` was given.
        seed: samples N thoughts before each token; default one greedy thought.
        another: the text whose thoughts are the control for content; default this text's own, half its length further on.
        add_special_tokens: as the tokenizer does; False for texts that have theirs, such as what a chat template writes.

    Raises:
        ValueError: no tokenizer, or a text that is empty, too long for the model's positions or holds the start or end id.
    """
    thinker, tokenizer, seed = instance("qs", qs, QuietStar).thinker, qs.tokenizer, checks.check_seed(seed)
    flag("add_special_tokens", add_special_tokens)
    check_whole("explain", qs.model)
    input_ids = _tokenize(thinker, tokenizer, "text", text, add_special_tokens)
    other_ids = input_ids if another is None else _tokenize(thinker, tokenizer, "another", another, add_special_tokens)
    # Only the next token is looked at, and greedy thoughts are identical.
    N = 1 if seed is None else thinker.config.thoughts
    one = qs.with_config(replace(thinker.config, thoughts=N, lookahead=1, reward="gain", advantage="relu"))
    thinker = one.thinker

    with dropout_off(thinker.model):
        own = _think(one, input_ids, seed, sequence_id=0)
        other = own if another is None else _think(one, other_ids, seed, sequence_id=1)
        P = input_ids.shape[1] - 1
        places = torch.arange(P, device=input_ids.device)
        taken = (places + (P // 2 if another is None else 0)) % (other_ids.shape[1] - 1)
        parts = [
            _predict(thinker, input_ids, anchors, _side_by_side(own, anchors, other, taken[anchors]))
            for anchors in places.split(max(1, ROWS // (2 * N * thinker.config.rows)))
        ]
    found = {name: [row for part in parts for row in part[name].tolist()] for name in parts[0]}
    finite = torch.tensor([[base, *mixed] for base, mixed in zip(found["base"], found["mixed"], strict=True)]).isfinite().all(1)
    if not finite.all():
        raise not_finite(thinker.model, f"at position {int((~finite).nonzero()[0])}")
    tokens = _tokens(tokenizer, input_ids[0].tolist(), found)
    settings = {name: getattr(thinker.config, name) for name in ("preset", "mixing", "thoughts", "thought_tokens")}
    return Report(_model(thinker.model), settings | {"seed": seed, "another": another}, tokens)


def _tokenize(thinker: Thinker, tokenizer: Any, name: str, text: str, special: bool) -> Tensor:
    """int64 [1,L]."""
    if tokenizer is None:
        raise ValueError("explain needs a tokenizer: pass one to QuietStar")
    unicode(name, text)
    ids = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    if len(ids) < 3:
        raise ValueError(f"{name} must have at least 3 tokens, got {len(ids)}")
    V = thinker.lm_head.linear.out_features
    if max(ids) >= V:
        raise ValueError(f"the tokenizer belongs to another model: it gives id {max(ids)}, and the vocabulary has {V} tokens")
    # Rotary positions have no end, but past the longest of the model's training its predictions say nothing.
    limit = getattr(thinker.model.config.get_text_config(), "max_position_embeddings", None)
    room = len(ids) + thinker.config.thought_tokens + 1  # the thought before the last token begins one place earlier
    if limit and room > limit:
        raise ValueError(
            f"{name} is too long: its {len(ids)} tokens and thoughts need {room} positions, "
            f"and {type(thinker.model).__name__} has {limit}"
        )
    return torch.tensor([ids], dtype=torch.int64, device=thinker.device)


def _think(one: QuietStar, input_ids: Tensor, seed: int | None, sequence_id: int) -> Thoughts:
    """The thoughts at all places of a text but its last."""
    anchors = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)[None]
    texts = one.texts(input_ids, anchors=anchors, sequence_ids=torch.full_like(input_ids, sequence_id))
    chunk = max(1, ROWS // (one.thought_config.thoughts * one.thought_config.rows))
    return one.sample(texts, seed or 0, seed is None, chunk).checked(one.model, texts.layout)


def _side_by_side(own: Thoughts, places: Tensor, other: Thoughts, taken: Tensor) -> Thoughts:
    """At each place its own N thoughts, then those of the other text at the place that is taken for it: 2 N."""
    pairs = ((own.thought_ids, other.thought_ids), (own.logprob, other.logprob), (own.lengths, other.lengths))
    return Thoughts(*(torch.cat([x[:, places], y[:, taken]], 2) for x, y in pairs))


def _predict(thinker: Thinker, input_ids: Tensor, anchors: Tensor, thoughts: Thoughts) -> dict[str, Tensor]:
    """Numbers [P,...] for the tokens after ``anchors`` [P]: everything that a report says about each."""
    N = thinker.config.thoughts
    thinker = replace(thinker, config=replace(thinker.config, thoughts=2 * N))
    layout = thinker.layout(input_ids, anchors=anchors[None], thought_lengths=thoughts.thought_lengths)
    tables = thinker.tables(layout, input_ids, input_ids)
    inputs = PackedInputs(layout, input_ids, thoughts.thought_ids, thoughts.thought_lengths, tables)
    on = sampled(thoughts.lengths, thoughts.thought_ids.shape[-1])
    text, ahead, logprob = thinker.packed_states(*inputs[:4], tables.rows)
    predicted = thinker.predict(inputs, text, ahead, logprob)

    h_base, h_thought = text[0, anchors], ahead[0, :, :N, 0]  # [P,D], [P,N,D]
    size = max(1, LOGITS // (thinker.lm_head.linear.out_features * (1 + 2 * N)))
    tops = [_top(thinker, base, mixed) for base, mixed in zip(h_base.split(size), h_thought.split(size), strict=True)]
    base_top, base_p, mixed_top, mixed_p = (torch.cat(column) for column in zip(*tops, strict=True))
    return {
        "base": predicted.nll_base[0, anchors],
        "mixed": predicted.nll_mix[0, :, :N, 0],
        "another": predicted.nll_mix[0, :, N:, 0].mean(-1),
        "weight": predicted.weight[0, :, :N, 0],
        "thought_ids": thoughts.thought_ids[0, :, :N],
        "length": thoughts.lengths[0, :, :N],
        "leaks": leaks(thoughts.thought_ids, on, tables.following)[0, :, :N],
        "base_top": base_top,
        "base_p": base_p,
        "mixed_top": mixed_top,
        "mixed_p": mixed_p,
    }


def _top(thinker: Thinker, h_base: Tensor, h_thought: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Likeliest ids and probabilities of base states [P,D], both [P,5], and of their mixes with thoughts [P,N,D], [P,N,5].

    Where log-probabilities mix, the mixed ones are those of the loss, which don't add up to 1.
    """
    base = thinker.logprobs(h_base)
    mixed = thinker.mixed_logprobs(h_base[:, None], h_thought)
    count = min(TOP, base.shape[-1])
    (base_p, base_top), (mixed_p, mixed_top) = base.topk(count), mixed.topk(count)
    return base_top, base_p.exp(), mixed_top, mixed_p.exp()


def _tokens(tokenizer: Any, ids: list[int], found: dict[str, list]) -> list[ExplainedToken]:
    show = cache(lambda token: token_text(tokenizer, token))

    def top(tokens: Sequence[int], probabilities: Sequence[float]) -> list[Alternative]:
        return [Alternative(x, show(x), p) for x, p in zip(tokens, probabilities, strict=True)]

    def thought(place: int, n: int) -> ExplainedThought:
        own = found["thought_ids"][place][n][: found["length"][place][n]]
        return ExplainedThought(
            ids=own,
            tokens=[show(x) for x in own],
            text=tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            weight=found["weight"][place][n],
            mixed=found["mixed"][place][n],
            top=top(found["mixed_top"][place][n], found["mixed_p"][place][n]),
            leaks=found["leaks"][place][n],
        )

    pieces = text_pieces(tokenizer, ids)
    nothing = dict.fromkeys((*LOSSES, *GAINS))
    tokens = [ExplainedToken(ids[0], pieces[0], **nothing, thoughts=[], top=[])]
    for place, (base, another) in enumerate(zip(found["base"], found["another"], strict=True)):
        thoughts = [thought(place, n) for n in range(len(found["mixed"][place]))]
        mixed = sum(x.mixed for x in thoughts) / len(thoughts)
        losses = {"base": base, "mixed": mixed, "another": another}
        gains = {"gain": base - mixed, "mixing": base - another, "content": another - mixed}
        likeliest = top(found["base_top"][place], found["base_p"][place])
        tokens.append(ExplainedToken(ids[place + 1], pieces[place + 1], **losses, **gains, thoughts=thoughts, top=likeliest))
    return tokens


def _model(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "class": type(unwrapped(model)).__name__,
        "model_type": model.config.model_type,
        "name": model.config.name_or_path,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
