"""Questions with right answers, from a .jsonl file or the hub. An answer is a number or one of several choices."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quietstar.data.rows import Row, question_and_answer
from quietstar.data.texts import hub_rows
from quietstar.evaluation.questions.answers import number
from quietstar.files.reading import as_type, json_lines
from quietstar_kernels.checks import file_path, integer, unicode

MARK = "####"  # precedes the value in an answer of GSM8K


@dataclass(frozen=True)
class Question:
    """A question and its right answer.

    Attributes:
        text: the question, without the choices.
        choices: the text of each choice by its label; empty if the answer is a number.
        answer: the right answer: a label, or a number in the form of ``answers.number``.
        written: the answer as the data has it, such as "1,000".
    """

    text: str
    choices: Mapping[str, str]
    answer: str
    written: str


def read_questions(source: str, split: str = "test", limit: int | None = None) -> list[Question]:
    """The questions of a .jsonl file or of a hub data set, ``name`` or ``name:subset``, in order.

    A row is one of
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
    path = Path(file_path("source", source))
    unicode("split", split)
    limit = None if limit is None else integer("limit", limit, 1, sys.maxsize)
    if path.suffix == ".jsonl":
        rows: Iterable[tuple[str, Any]] = ((f"{path}: line {i}", row) for i, row in json_lines(path))
    elif path.exists():
        raise ValueError(f"{path}: questions come from a file ending in .jsonl")
    else:
        rows = ((f"{source}: row {i}", row) for i, row in enumerate(hub_rows(source, split, limit), 1))
    questions = [parse(row, where) for where, row in islice(rows, limit)]
    if not questions:
        raise ValueError(f"{source}: there is no question in it")
    return questions


def parse(row: Any, where: str) -> Question:
    """The question in a row of the data. Raises ValueError if the row is invalid; its message begins with ``where``."""
    return question_of(as_type(Row, row, where), where)


def question_of(row: Row, where: str) -> Question:
    """As ``parse``, for a row that has the right types."""
    text, choices, answer = question_and_answer(row, where)
    if choices:
        return Question(text, choices, answer, answer)
    written = answer.split(MARK)[-1].strip()
    value = number(written)
    if value is None:
        raise ValueError(f"{where} has no choices, so its answer must be a number, got {written[:40]!r}")
    return Question(text, {}, value, written)
