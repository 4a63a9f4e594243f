"""How likely the tokens of given texts are, without thoughts and with one greedy thought before each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from quietstar import checks
from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.modules import check_whole, dropout_off, embeddings
from quietstar.model import QuietStar
from quietstar.texts import Texts, with_lengths
from quietstar_kernels.checks import INTEGERS, instance, integer, items, refusal, refuse_outside, tensor

# At a time: thought rows of the packed forward, and logits.
ROWS, LOGITS = 2**13, 2**24


@dataclass(frozen=True)
class Scores:
    """Of the tokens at some places, fp32 and bool [P], of one text."""

    logprob: Tensor  # log p of the token, nats
    likeliest: Tensor  # no other token has a higher p


def one_thought(qs: QuietStar) -> QuietStar:
    """The same weights, with one thought and only the next token: greedy thoughts at a position are identical."""
    config = instance("qs", qs, QuietStar).thought_config
    one = replace(config, thoughts=1, lookahead=1, reward="gain", advantage="relu", base_model="current", kl_weight=0.0)
    return qs.with_config(one)


@torch.no_grad()
def score_tokens(
    qs: QuietStar,
    texts: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    think: str | float = "always",
    allowed: Sequence[Tensor] | None = None,
) -> list[tuple[Scores, Scores]]:
    """Score the tokens at the ``places`` of each text, without thoughts and as ``think`` says (the same for "never").

    A thought is at the position before its token. Mixed log-probabilities are normalised, as in generation.

    Args:
        texts: token ids of B texts.
        places: of each text, ascending, from 1, since nothing predicts the first token.
        think: "always", "never", or a number: where the entropy of the base model's prediction exceeds it, nats.
        allowed: of each text the token ids, int64 [...], among which probabilities are taken; default all V.

    Raises:
        ValueError: those of ``QuietStar.forward``.
    """
    one = one_thought(qs)
    _check(one, texts, places, allowed)
    think = checks.check_think("think", think)
    device = qs.start_embedding.device
    input_ids, attention_mask = _pad(texts, 0, device), _pad([[1] * len(text) for text in texts], 0, device)
    anchors = _pad([[place - 1 for place in row] or [-1] for row in places], -1, device)
    chunk = max(1, ROWS // (len(texts) * one.thought_config.rows))
    with dropout_off(qs):
        parts = [_score(one, input_ids, attention_mask, part, think, allowed) for part in anchors.split(chunk, 1)]
    base, mixed, base_first, mixed_first = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return [
        (Scores(base[b, :n], base_first[b, :n]), Scores(mixed[b, :n], mixed_first[b, :n]))
        for b, n in enumerate(map(len, places))
    ]


def _check(
    one: QuietStar, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]], allowed: Sequence[Tensor] | None
) -> None:
    check_whole("score_tokens", one.model)
    V = one.lm_head.linear.out_features
    for text in items("texts", texts, 1):
        for token in items("texts", text, 1):
            integer("texts", token, 0, V - 1)
    for name, rows in {"places": places, "allowed": [None] * len(texts) if allowed is None else allowed}.items():
        if len(items(name, rows)) != len(texts):
            raise ValueError(f"{name} must have a row for each of the {len(texts)} texts, got {len(rows)}")
    for row, text in zip(places, texts, strict=True):
        for place in items("places", row):
            integer("places", place, 1, len(text) - 1)
        if any(b <= a for a, b in pairwise(row)):
            raise refusal("places", "ascending", row)
    for ids in allowed or ():
        tensor("allowed", ids, "A", {}, one.start_embedding.device, INTEGERS)
        if ids.device.type == "cpu":  # elsewhere this would wait for the device
            refuse_outside("allowed", ids, V - 1, "V-1")


def _pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """int64 [B, the longest], filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)


def _score(
    one: QuietStar,
    input_ids: Tensor,
    attention_mask: Tensor,
    anchors: Tensor,
    think: str | float,
    allowed: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob [B,P] without thoughts and with, then whether the token is the likeliest; anything where the anchor is -1."""
    B, P = anchors.shape
    thinker = one.thinker
    layout = thinker.layout(input_ids, attention_mask, anchors)
    if think == "never":
        layout = layout.text_only()
        embeds = embeddings(thinker.model)(input_ids)
        text = decode_rows(thinker.model, embeds, layout.text_position_ids(), PackedPass(layout))
    else:
        texts = Texts(input_ids, attention_mask, input_ids, torch.zeros_like(input_ids), layout)
        thoughts = one.sample(texts, 0, greedy=True)
        layout = with_lengths(layout, thoughts.thought_lengths, thinker.config.lookahead)
        text, ahead, _ = thinker.packed_states(layout, input_ids, thoughts.thought_ids, thoughts.thought_lengths)
        h_thought = ahead[:, :, 0, 0]
    rows = torch.arange(B, device=anchors.device)[:, None].expand(B, P)
    target = input_ids[rows, (anchors + 1).clamp(max=input_ids.shape[1] - 1)]
    h_base = text[rows, anchors.clamp(min=0)]

    found = [torch.empty(B, P, device=anchors.device, dtype=kind) for kind in (torch.float32,) * 2 + (torch.bool,) * 2]
    size = max(1, LOGITS // (3 * thinker.lm_head.linear.out_features))
    for b in range(B):
        for part in torch.arange(P, device=anchors.device).split(size):
            base = thinker.logprobs(h_base[b, part])
            mixed = base
            if think != "never":
                mixed = thinker.mixed_logprobs(h_base[b, part], h_thought[b, part])
            if isinstance(think, (int, float)):
                entropy = torch.special.entr(base.softmax(-1)).sum(-1, keepdim=True)
                mixed = torch.where(entropy > think, mixed, base)
            for i, logits in enumerate((base, mixed)):
                if allowed is not None:
                    kept = logits[:, allowed[b]]
                    logits = torch.full_like(logits, -torch.inf).index_copy(1, allowed[b], kept)
                logits = logits.log_softmax(-1)
                own = logits.gather(1, target[b, part, None])
                found[i][b, part] = own[:, 0]
                found[2 + i][b, part] = (logits <= own).all(-1)
    return found[0], found[1], found[2], found[3]
