"""Problems read from .jsonl files of questions: GSM8K, CommonsenseQA, and data like them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.evaluation.questions import reading as questions
from quietstar.evaluation.questions.answers import STOP, extract
from quietstar.evaluation.questions.asking import prompt as question_prompt
from quietstar.evaluation.questions.reading import Question, question_of
from quietstar.files.reading import json_lines
from quietstar_recipes.tasks.base import MARK, SPLITS, Problem, Row, Task, split_of


class QuestionFile(Task):
    """Problems from a .jsonl file, or from a folder's train.jsonl and test.jsonl."""

    stop = STOP
    step_marks = ("\n",)
    between = f"\n{MARK}"
    again = "\n\nThere may be a mistake above. Solve it once more.\nA:"

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase):
        self.path = Path(path)
        if self.path.is_dir():
            training, test = ([x for _, x in self._read(self.path / f"{name}.jsonl")] for name in ("train", "test"))
            # The test problems have a file of their own, so what the hash calls "test" in the training file is trained on.
            self.by_split = {"test": test, "valid": [x for x in training if split_of(x.prompt) == "valid"]}
            self.by_split["train"] = [x for x in training if split_of(x.prompt) != "valid"]
        else:
            rows = self._read(self.path)
            self.by_split = {split: [x for found, x in rows if found == split] for split in SPLITS}
        super().__init__(tokenizer)

    @property
    def files(self) -> list[Path]:
        return [self.path / f"{name}.jsonl" for name in ("train", "test")] if self.path.is_dir() else [self.path]

    @property
    def name(self) -> str:
        return f"{type(self).__name__} {self.path}"

    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        return shuffled(self.by_split[split], generator)[:n]

    def sample_with_chain(self, n: int, generator: torch.Generator) -> list[Row]:
        return self._rows(shuffled([x for x in self.by_split["train"] if x.chain], generator)[:n])

    def answer(self, row: Row, ids: Sequence[int]) -> str | None:
        return extract(self.text(ids), row.problem.choices)

    def check_chain(self, row: Row, ids: Sequence[int]) -> bool | None:
        return None

    def _read(self, path: Path) -> list[tuple[str, Problem]]:
        rows = []
        for number, row in json_lines(path, questions.Row):
            problem = self.problem(row, question_of(row, f"{path}: line {number}"))
            rows.append((split_of(problem.prompt), problem))
        if not rows:
            raise ValueError(f"{path}: there is no question in it")
        return rows

    @abstractmethod
    def problem(self, row: questions.Row, question: Question) -> Problem:
        """The problem of one line of the file."""


def shuffled(problems: Sequence[Problem], generator: torch.Generator) -> list[Problem]:
    return [problems[i] for i in torch.randperm(len(problems), generator=generator).tolist()]


class GSM8K(QuestionFile):
    """GSM8K and data like it. The chain is the part of the answer before ``####``; a hint is the solution in brackets."""

    def problem(self, row: questions.Row, question: Question) -> Problem:
        chain = str(row.answer or "").rpartition(MARK)[0].strip()
        solution = f"{chain} {MARK} {question.written}" if chain else question.written
        hinted = question_prompt(replace(question, text=f"{question.text} ({solution})"))
        chain = f" {chain}" if chain else ""
        return Problem(question_prompt(question), hinted, chain, f" {question.written}", question.answer)


class CommonsenseQA(QuestionFile):
    """CommonsenseQA and data like it. The chain is the optional field "rationale"; a hint marks the right choice."""

    def problem(self, row: questions.Row, question: Question) -> Problem:
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
