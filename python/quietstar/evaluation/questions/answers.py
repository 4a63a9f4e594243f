"""Answers: generating their texts in batches, where they end, what they are, and what several vote for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from quietstar.checks import pad_id
from quietstar.hf.ends import end_ids
from quietstar.model import QuietStar

# The answer ends where the next question begins; the same strings as in the published code.
STOP = ("Q:", "\n\n\n")
# A minus after a digit or a bracket is a subtraction.
NUMBER = r"(?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
MARKED = re.compile(rf"####\s*({NUMBER})")
STATED = re.compile(rf"\banswer(?:\s*\([^)]*\))?(?:\s+is|\s*[:=])[:\s]*({NUMBER})", re.IGNORECASE)
CALCULATOR = re.compile(r"<<.*?(?:>>|$)", re.DOTALL)


def cut(text: str, stop: Iterable[str] = STOP) -> str:
    """The text before the first of these strings."""
    return text[: min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))]


def extract(text: str, choices: Mapping[str, str]) -> str | None:
    """The answer in a generated text: a label of ``choices``, or a number if there are none. None if no answer is found.

    It is what follows the last ``####``, else what follows the last "answer is" or "answer:". Failing that, a number is the
    last one in the text, without calculator marks (``<<2*3=6>>``). A label is the one that the text begins with, else the only
    one in brackets, else the label of the choice that the first line repeats.
    """
    return _extract_label(text, choices) if choices else _extract_number(text)


def number(text: str) -> str | None:
    """The number in a text in a standard form, "1000" for "$1,000.00"; None if the text has no number or several."""
    found = re.findall(NUMBER, text)
    return _plain(found[0]) if len(found) == 1 else None


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, and the earliest of equally frequent ones; None if there is no answer at all."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def _extract_number(text: str) -> str | None:
    text = CALCULATOR.sub("", text)
    for pattern in (MARKED, STATED, re.compile(rf"({NUMBER})")):
        found = pattern.findall(text)
        if found:
            return _plain(found[-1])
    return None


def _plain(written: str) -> str:
    whole, _, rest = re.sub(r"[-$,]", "", written).partition(".")
    value = f"{whole.lstrip('0') or '0'}.{rest.rstrip('0')}".rstrip(".")
    return f"-{value}" if written.startswith("-") and value != "0" else value


def _extract_label(text: str, choices: Mapping[str, str]) -> str | None:
    label = "|".join(re.escape(x) for x in sorted(choices, key=len, reverse=True))
    bare = rf"(?:\(({label})\)|({label})(?![\w'’-]))"
    for sign in (r"####\s*", r"(?i:\banswer(?:\s+is|\s*[:=]))[:\s]*"):
        if stated := re.findall(sign + bare, text):
            return "".join(stated[-1])
    first = re.match(rf"\s*{bare}(?!\s+[a-z])", text)
    if first:
        return first[1] or first[2]
    bracketed = set(re.findall(rf"\(({label})\)", text))
    if len(bracketed) == 1:
        return bracketed.pop()
    line = next((line.strip().strip(".").lower() for line in text.splitlines() if line.strip()), None)
    repeated = [x for x, choice in choices.items() if choice.strip(".").lower() == line]
    return repeated[0] if len(repeated) == 1 else None


def batches_by_length(texts: Sequence[Sequence[Any]], size: int) -> list[list[int]]:
    """Indices of texts of similar length, the longest first, so that running out of memory shows at once."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def continue_texts(
    qs: QuietStar, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], **options: Any
) -> list[str]:
    """The new text after each prompt, before the first stop string; ``options`` are those of ``qs.generate``."""
    tokenizer = cast(Any, qs.tokenizer)
    pad, L = pad_id(qs.config), max(map(len, prompts))
    ids = [[pad] * (L - len(row)) + list(row) for row in prompts]
    mask = [[0] * (L - len(row)) + [1] * len(row) for row in prompts]
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    device = qs.start_embedding.device
    out = qs.generate(
        torch.tensor(ids, device=device),
        torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **options,
    )
    ends, texts = set(end_ids(tokenizer, qs.model)), []
    for row in out[:, L:].tolist():
        length = next((i for i, x in enumerate(row, 1) if x in ends), None)  # what pads the row may be a letter
        texts.append(cut(tokenizer.decode(row[:length], skip_special_tokens=True), stop))
    return texts
