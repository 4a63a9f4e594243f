"""Questions with right answers, from a .jsonl file or the hub. An answer is a number or one of several choices."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from quietstar.data.rows import Asked, question_and_answer
from quietstar.data.sources import rows, sources
from quietstar.evaluation.questions.answers import is_formula, number, written_answer
from quietstar_kernels.checks import file_path, integer, unicode


@dataclass(frozen=True)
class Question:
    """A question and its right answer.

    Attributes:
        text: the question, without the choices.
        choices: the text of each choice by its label; empty if the answer is a number.
        answer: the right answer: a label, a number in the form of ``answers.number``, or a formula.
        written: the answer as the data has it, such as "1,000".
        system: a system prompt; may be empty.
    """

    text: str
    choices: Mapping[str, str]
    answer: str
    written: str
    system: str = ""


def read_questions(source: str, split: str = "test", limit: int | None = None) -> list[Question]:
    """The questions of ``data.sources.sources``: files, folders, hub data sets (``name`` or ``name:subset``), in order.

    A row is one of these, or has other names of ``data.rows.QUESTIONS`` and ``ANSWERS``:
        {"question": "...", "answer": "... #### 18"}, as in GSM8K; the value alone is enough
        {"question": {"stem": "...", "choices": [{"label": "A", "text": "..."}, ...]}, "answerKey": "A"}, as in CommonsenseQA
        {"question": "...", "choices": {"label": [...], "text": [...]}, "answerKey": "A"}, as in ARC and on the hub
        {"question": "...", "choices": ["...", ...], "answer": 0}, as in MMLU: the right one's index, label or text

    Args:
        split: of a hub data set.
        limit: how many to read from the start; default all.

    Raises:
        ValueError: there is no such file or data set, or no question in it; a line is broken or has no answer, and is named.
    """
    file_path("source", source)
    unicode("split", split)
    limit = None if limit is None else integer("limit", limit, 1, sys.maxsize)
    found = (row for name in sources(source) for row in rows(name, split, limit))
    questions = [parse(row, where) for where, row in islice(found, limit)]
    if not questions:
        raise ValueError(f"{source}: there is no question in it")
    return questions


def parse(row: Any, where: str) -> Question:
    """The question in a row of the data. Raises ValueError if the row is invalid; its message begins with ``where``."""
    return question_of(question_and_answer(row, where), where)


def question_of(asked: Asked, where: str) -> Question:
    """As ``parse``, for a row that was read."""
    if asked.choices:
        return Question(asked.text, asked.choices, asked.answer, asked.answer, asked.system)
    written = written_answer(asked.answer)
    value = number(written) or (written if is_formula(written) else None)
    if value is None:
        wanted = f"its answer must be a number, got {written[:40]!r}; formulas need math-verify: pip install math-verify"
        raise ValueError(f"{where} has no choices, so {wanted}")
    return Question(asked.text, {}, value, written, asked.system)
