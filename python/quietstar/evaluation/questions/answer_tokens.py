"""The tokens of a right answer whose published probability is measured, and the tokens that it is normalised over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor

from quietstar.evaluation.questions.reading import Question
from quietstar.model import QuietStar

SPACES = "▁Ġ "  # ways that vocabularies write the space at the start of a token


@dataclass(frozen=True)
class ScoredAnswer:
    """A prompt with its right answer.

    Attributes:
        ids: tokens of the prompt, the answer and the line end.
        places: indices of the tokens whose probabilities are multiplied.
        allowed: int64 [...], the token ids that these probabilities are normalised over.
    """

    ids: list[int]
    places: list[int]
    allowed: Tensor


def scored_answers(qs: QuietStar, asked: Sequence[tuple[str, Question]]) -> list[ScoredAnswer]:
    """The tokens that the published probability of each right answer needs; ``asked`` holds prompts with their questions.

    As in ``compute_metrics`` of the published code, the text is the prompt, a space, the answer and a line end. The probability
    is the product of p(token) over the answer's tokens and the line end, each given the right tokens before it, among the
    tokens that an answer can have: for a number those of digits alone and the line end, for choices those of the labels and the
    line end. Other tokens, such as the comma of "1,000" or a single space, are skipped. The published code calls the mean over
    questions accuracy.

    There are three differences. The published code knows only Mistral's token ids; here they are found for any tokenizer, and
    for Mistral's they are the same. It cuts long texts at random to 256 tokens; here nothing is cut. And for a number that
    begins with a minus it uses the set of letters.

    Raises:
        ValueError: none of an answer's tokens is in its set.
    """
    digits = _digit_tokens(qs)
    return [_scored(qs, prompt, question, digits) for prompt, question in asked]


def encode(qs: QuietStar, text: str) -> list[int]:
    """Token ids of a text to be continued. Raises ValueError if they are not in the model's vocabulary."""
    assert qs.tokenizer is not None
    ids = list(qs.tokenizer(text, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == qs.tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text
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
    """Ids of the tokens that consist of ASCII digits, with or without a space before them."""
    assert qs.tokenizer is not None
    count = min(len(qs.tokenizer), qs.lm_head.linear.out_features)
    entries = (str(entry).lstrip(SPACES) for entry in qs.tokenizer.convert_ids_to_tokens(list(range(count))))
    return {i for i, entry in enumerate(entries) if entry.isascii() and entry.isdigit()}
