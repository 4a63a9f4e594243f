"""GSM8K."""

from __future__ import annotations

from dataclasses import replace

from quietstar.evaluation.questions.asking import prompt as question_prompt
from quietstar.evaluation.questions.reading import Question, Row
from quietstar.recipes.tasks.base import Problem
from quietstar.recipes.tasks.marks import MARK
from quietstar.recipes.tasks.question_file import QuestionFile


class GSM8K(QuestionFile):
    """GSM8K and data like it. The chain is the part of the answer before ``####``; a hint is the solution in brackets."""

    def problem(self, row: Row, question: Question) -> Problem:
        chain = str(row.answer or "").rpartition(MARK)[0].strip()
        solution = f"{chain} {MARK} {question.written}" if chain else question.written
        hinted = question_prompt(replace(question, text=f"{question.text} ({solution})"))
        chain = f" {chain}" if chain else ""
        return Problem(question_prompt(question), hinted, chain, f" {question.written}", question.answer)
