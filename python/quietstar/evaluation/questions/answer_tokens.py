"""Which tokens of a right answer the published probability looks at, and among which tokens it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.evaluation.questions.reading import Question

if TYPE_CHECKING:
    from quietstar.model import QuietStar

SPACES = "▁Ġ "  # how vocabularies write the space that a token begins with


@dataclass(frozen=True)
class ScoredAnswer:
    """A prompt with its right answer.

    Attributes:
        ids: tokens of the prompt, the answer and the end of the line.
        places: of the tokens whose probabilities are multiplied.
        allowed: int64 [...], the tokens among which those probabilities are taken.
    """

    ids: list[int]
    places: list[int]
    allowed: Tensor


def scored_answers(qs: QuietStar, asked: Sequence[tuple[str, Question]]) -> list[ScoredAnswer]:
    """What the published probability of each right answer is made of; ``asked`` holds prompts and their questions.

    As in ``compute_metrics`` of the published code, the text is the prompt, a space, the answer and a line end; its
    probability is the product over the answer's tokens and the line end, each with the right tokens before it, of p(token)
    among the tokens that an answer can be made of: those of digits alone and the line end for a number, those of the labels
    and the line end for choices. Tokens outside are passed over, such as the comma of "1,000" or a space alone. The mean over
    questions is what the published code calls accuracy. Three things differ. It knows Mistral's token ids only, while here any
    tokenizer's own are found; with Mistral's they are the same. It cuts long texts at random to 256 tokens, here nothing is
    cut. And it takes the set of letters for a number that begins with a minus.

    Raises:
        ValueError: an answer none of whose tokens is in its set.
    """
    digits = _digit_tokens(qs)
    return [_scored(qs, prompt, question, digits) for prompt, question in asked]


def encode(qs: QuietStar, text: str) -> list[int]:
    """Token ids of a text that goes on; ValueError where the tokenizer is of another vocabulary."""
    assert qs.tokenizer is not None
    ids = list(qs.tokenizer(text, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == qs.tokenizer.eos_token_id:
        ids.pop()  # some tokenizers close every text
    V = qs.lm_head.linear.out_features
    if not ids or max(ids) >= V:
        got = f"id {max(ids)}, and the vocabulary has {V} tokens" if ids else f"no tokens for {text[:40]!r}"
        raise ValueError(f"the tokenizer is of another model: it gives {got}")
    return ids


def _scored(qs: QuietStar, prompt: str, question: Question, digits: set[int]) -> ScoredAnswer:
    head = encode(qs, prompt)
    ids = encode(qs, f"{prompt} {question.written}\n")
    start, line_end = len(commonprefix([head, ids])), ids[-1]
    own = digits
    if question.choices:
        tails = [set(encode(qs, f"{prompt} {label}\n")[start:]) for label in question.choices]
        own = tails[0].union(*tails) - tails[0].intersection(*tails)
    places = [i for i in range(start, len(ids)) if ids[i] in own or i == len(ids) - 1]
    if not start or not own.intersection(ids[start:]):
        raise ValueError(f"the tokenizer has no tokens for the answer {question.written!r} alone, so it has no probability")
    return ScoredAnswer(ids, places, torch.tensor(sorted({*own, line_end}), device=qs.start_embedding.device))


def _digit_tokens(qs: QuietStar) -> set[int]:
    """The vocabulary's tokens of ASCII digits alone, with or without a space before them."""
    assert qs.tokenizer is not None
    count = min(len(qs.tokenizer), qs.lm_head.linear.out_features)
    entries = (str(entry).lstrip(SPACES) for entry in qs.tokenizer.convert_ids_to_tokens(list(range(count))))
    return {i for i, entry in enumerate(entries) if entry.isascii() and entry.isdigit()}
