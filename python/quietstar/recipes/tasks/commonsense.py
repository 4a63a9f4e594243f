"""CommonsenseQA."""

from __future__ import annotations

from dataclasses import replace

from quietstar.evaluation.questions.asking import prompt as question_prompt
from quietstar.evaluation.questions.reading import Question, Row
from quietstar.recipes.tasks.base import Problem
from quietstar.recipes.tasks.question_file import QuestionFile


class CommonsenseQA(QuestionFile):
    """CommonsenseQA and data like it. The chain is the optional field "rationale"; a hint marks the right choice."""

    def problem(self, row: Row, question: Question) -> Problem:
        if not question.choices:
            raise ValueError(f"{self.path}: {question.text[:40]!r} has no choices")
        marked = {x: f"{text} (CORRECT)" if x == question.answer else text for x, text in question.choices.items()}
        chain = (row.rationale or "").strip()
        return Problem(
            question_prompt(question),
            question_prompt(replace(question, choices=marked)),
            f" {chain}" if chain else "",
            f" ({question.answer})",
            question.answer,
            question.choices,
        )
