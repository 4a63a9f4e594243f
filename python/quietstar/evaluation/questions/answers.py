"""Answers: generating their texts in batches, where they end, what they are, and what several vote for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch

from quietstar.checks import pad_id
from quietstar.data.rows import MARK
from quietstar.files.reading import numbered_lines
from quietstar.hf.ends import end_ids
from quietstar.model import QuietStar

# The answer ends where the next question begins; the same strings as in the published code.
STOP = ("Q:", "\n\n\n")
# A minus after a digit or a bracket is a subtraction.
PLAIN = r"(?:[0-9]+(?:(?:,[0-9]{2})*,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = rf"(?:(?<![\w)])-)?(?:\$-?)?(?:(?<![\w/]){PLAIN}/{PLAIN}(?![\d/])|{PLAIN}(?:[eE][+-]?[0-9]{{1,3}}(?!\w))?)"
DIGITS = r"[0-9](?: [0-9])+(?![\w.,/])"  # as in the published files of implicit chain of thought
MARKED = re.compile(rf"####\s*({DIGITS}|{NUMBER})")
SAYS = r"\b(?i:answer|option|choice)(?:\s*\([^)]*\))?(?i:\s+is|\s*[:=])[:\s$]*"
STATED = re.compile(rf"{SAYS}(?:[A-Za-z]\w*\s*=\s*)?({NUMBER})")
CALCULATOR = re.compile(r"<<.*?(?:>>|$)", re.DOTALL)
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
# What is written around numbers and labels in Markdown and LaTeX, and what stands for it.
WRITTEN = [
    (re.compile("[\u2212\ufe63\uff0d]"), "-"),
    (re.compile(r"(?<![\w*])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?!\w)"), r"\1"),
    (re.compile(r"\\(?:text|textbf|mathbf|mathrm|mathit)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[()\[\]]|(?<=\d)(?=\\[dtc]?frac)"), " "),
    (re.compile(r"\\[,!;: ]|\\(?:left|right)(?![a-z])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<![A-Za-z])(mm|cm|km|m|ft|in|units?)\s*\^(?:[23]|\{[23]\})|\^(?:\\circ|\{\\circ\})"), r"\1"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(rf"\\[dtc]?frac\s*\{{\s*(-?{PLAIN})\s*\}}\s*\{{\s*({PLAIN})\s*\}}"), r"\1/\2"),
]
FORMULA = re.compile("[\\\\^*\u00d7\u00f7\u221a\u03c0\u221e{}]")


def cut(text: str, stop: Iterable[str] = STOP) -> str:
    """The text before the first of these strings."""
    return text[: min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))]


def extract(text: str, choices: Mapping[str, str], right: str | None = None) -> str | None:
    """The answer in a generated text: a label of ``choices``, or a number if there are none. None if no answer is found.

    It is what follows the last ``####``, else what is in the last ``\\boxed{}``, else what follows the last "answer is" or
    "answer:". Failing that, a number is the last one in the text, without calculator marks (``<<2*3=6>>``). A label is the one
    that the text begins with, else the only one in brackets, else the label of the choice that the first line repeats.

    Args:
        right: the right answer, which is returned for another form of it too where math-verify is installed.
    """
    plain = _without_markup(text)
    if choices:
        return _extract_label(plain, choices)
    found = _extract_number(plain)
    if right is None or found == right or (number(right) is not None and "\\" not in text):
        return found
    return right if _same_value(right, text) else found


def number(text: str) -> str | None:
    """The number in a text in a standard form, "1000" for "$1,000.00", "0.5" for "\\frac{1}{2}", "1/3"; None if the text has no
    number or several, or is a formula."""
    plain = _without_markup(BOXED.sub(r"\1", text))
    found = [plain] if re.fullmatch(DIGITS, plain) else re.findall(NUMBER, plain)
    return _plain(found[0]) if len(found) == 1 and not FORMULA.search(plain) else None


def written_answer(text: str) -> str:
    """What an answer comes to: what follows the last ``####``, else what is in the last ``\\boxed{}``, else all of it."""
    boxed = BOXED.findall(text)
    return text.split(MARK)[-1].strip() if MARK in text or not boxed else boxed[-1].strip()


def is_formula(text: str) -> bool:
    """Whether a text without words is one that math-verify reads, if that is installed."""
    return not re.search(r"(?<!\\)\b(?!sqrt)[A-Za-z]{4,}", text) and _same_value(text, f"${text}$")


def _same_value(right: str, text: str) -> bool:
    if find_spec("math_verify") is None:
        return False
    library = import_module("math_verify")
    gold, found = library.parse(f"${right}$"), library.parse(text)
    return bool(gold) and library.verify(gold, found)


def _without_markup(text: str) -> str:
    for pattern, instead in WRITTEN:
        text = pattern.sub(instead, text)
    return text


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, and the earliest of equally frequent ones; None if there is no answer at all."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def _extract_number(text: str) -> str | None:
    text = CALCULATOR.sub("", text)
    boxed = [] if MARKED.search(text) else BOXED.findall(text)
    if boxed and (value := number(boxed[-1])):
        return value
    for pattern in (MARKED, STATED, re.compile(rf"({NUMBER})")):
        found = pattern.findall(text)
        if found:
            return _plain(found[-1])
    return None


def _plain(written: str) -> str:
    if " " in written:
        return written.replace(" ", "")
    written = re.sub(r"[$,]", "", written)
    if re.search("[/eE]", written):
        above, _, below = written.partition("/")
        try:
            value = Fraction(above) / Fraction(below or 1)
        except (ValueError, ZeroDivisionError):  # too many digits, or a half of nothing
            return written
        decimal = Decimal(value.numerator) / value.denominator
        written = f"{decimal:f}" if decimal == value else str(value)
        if "/" in written:
            return written
    whole, _, part = written.lstrip("-").partition(".")
    found = f"{whole.lstrip('0') or '0'}.{part.rstrip('0')}".rstrip(".")
    return f"-{found}" if written.startswith("-") and found != "0" else found


def _extract_label(text: str, choices: Mapping[str, str]) -> str | None:
    label = "|".join(re.escape(x) for x in sorted(choices, key=len, reverse=True))
    bare = rf"(?:\(({label})\)|({label})(?![\w'’-]))"
    for sign in (r"####\s*", r"\\boxed\s*\{\s*", rf"{SAYS}(?:(?i:option|choice)\s+)?\$?"):
        if stated := re.findall(sign + bare, text):
            return "".join(stated[-1])
    first = re.match(rf"\s*{bare}(?!\s+[a-z])", text)
    if first:
        return first[1] or first[2]
    bracketed = set(re.findall(rf"\(({label})\)", text))
    if len(bracketed) == 1:
        return bracketed.pop()
    line = next((line.strip().strip(".").lower() for _, line in numbered_lines(text)), None)
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
