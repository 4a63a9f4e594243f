"""Answers in generated text: where the model's answer stops, what it is, and what several of them vote for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["cut", "extract", "number", "vote"]

# Where the next question begins the answer has ended; those of the published code.
STOP = ("Q:", "\n\n\n")
# A minus behind a digit or a bracket subtracts.
NUMBER = r"(?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
MARKED = re.compile(rf"####\s*({NUMBER})")
TOLD = re.compile(rf"\banswer(?:\s*\([^)]*\))?(?:\s+is|\s*[:=])[:\s]*({NUMBER})", re.IGNORECASE)
CALCULATOR = re.compile(r"<<.*?(?:>>|$)", re.DOTALL)


def cut(text: str, stop: Iterable[str] = STOP) -> str:
    """The text up to the first of these strings."""
    return text[: min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))]


def extract(text: str, choices: Mapping[str, str]) -> str | None:
    """The answer that a generated text gives: a label of ``choices``, or a number where there are none. None: it gives none.

    What stands behind the last ``####``, else the last that "answer is" or "answer:" tells. Else, of numbers, the last of all;
    calculator marks (``<<2*3=6>>``) don't count. Else, of labels, one that the text begins with, else the only one in brackets,
    else that of the choice that the first line repeats.
    """
    return _extract_label(text, choices) if choices else _extract_number(text)


def number(text: str) -> str | None:
    """A number in one way of writing, "1000" for "$1,000.00"; None where the text has none, or more than one."""
    found = re.findall(NUMBER, text)
    return _plain(found[0]) if len(found) == 1 else None


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, of equally frequent ones that which came first. None where there is no answer at all."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def _extract_number(text: str) -> str | None:
    text = CALCULATOR.sub("", text)
    for pattern in (MARKED, TOLD, re.compile(rf"({NUMBER})")):
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
        if told := re.findall(sign + bare, text):
            return "".join(told[-1])
    first = re.match(rf"\s*{bare}(?!\s+[a-z])", text)
    if first:
        return first[1] or first[2]
    bracketed = set(re.findall(rf"\(({label})\)", text))
    if len(bracketed) == 1:
        return bracketed.pop()
    line = next((line.strip().strip(".").lower() for line in text.splitlines() if line.strip()), None)
    repeated = [x for x, choice in choices.items() if choice.strip(".").lower() == line]
    return repeated[0] if len(repeated) == 1 else None
