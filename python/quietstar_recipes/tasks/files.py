"""Problems read from files of questions: GSM8K, CommonsenseQA, and data like them."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.data.rows import Asked, question_and_answer
from quietstar.data.sources import FILES, sources
from quietstar.data.sources import rows as rows_of
from quietstar.evaluation.questions.answers import STOP, extract
from quietstar.evaluation.questions.asking import prompt as question_prompt
from quietstar.evaluation.questions.reading import Question, question_of
from quietstar_recipes.tasks.base import MARK, SPLITS, Problem, Row, Task, split_of


class QuestionFile(Task):
    """Problems from files that ``ask`` reads, or from a folder's train and test, such as train.jsonl and test.jsonl."""

    stop = STOP
    step_marks = ("\n",)
    between = f"\n{MARK}"
    again = "\n\nThere may be a mistake above. Solve it once more.\nA:"

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase):
        self.path = Path(path)
        if self.path.is_dir():
            training, test = ([x for _, x in self._read(self._within(name))] for name in ("train", "test"))
            # The test problems have a file of their own, so what the hash calls "test" in the training file is trained on.
            self.by_split = {"test": test, "valid": [x for x in training if split_of(x.prompt) == "valid"]}
            self.by_split["train"] = [x for x in training if split_of(x.prompt) != "valid"]
        else:
            rows = self._read(self.path)
            self.by_split = {split: [x for found, x in rows if found == split] for split in SPLITS}
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"{type(self).__name__} {self.path}"

    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        return shuffled(self.by_split[split], generator)[:n]

    def sample_with_chain(self, n: int, generator: torch.Generator) -> list[Row]:
        return self._rows(shuffled([x for x in self.by_split["train"] if x.chain], generator)[:n])

    def answer(self, row: Row, ids: Sequence[int]) -> str | None:
        return extract(self.text(ids), row.problem.choices, row.problem.right)

    def check_chain(self, row: Row, ids: Sequence[int]) -> bool | None:
        return None

    def _within(self, name: str) -> Path:
        paths = (self.path / f"{name}{end}" for end in FILES)
        return next((path for path in paths if path.exists()), self.path / f"{name}.jsonl")

    def _read(self, path: Path) -> list[tuple[str, Problem]]:
        rows, names = [], sources(str(path))
        self.files = [*self.files, *filter(os.path.exists, names)]
        for where, row in (row for name in names for row in rows_of(name, "train")):
            asked = question_and_answer(row, where)
            problem = self.problem(asked, question_of(asked, where))
            rows.append((split_of(problem.prompt), problem))
        if not rows:
            raise ValueError(f"{path}: there is no question in it")
        return rows

    @abstractmethod
    def problem(self, asked: Asked, question: Question) -> Problem:
        """The problem of one row."""


def shuffled(problems: Sequence[Problem], generator: torch.Generator) -> list[Problem]:
    return [problems[i] for i in torch.randperm(len(problems), generator=generator).tolist()]


class GSM8K(QuestionFile):
    """GSM8K and data like it. The chain is the part of the answer before ``####``; a hint is the solution in brackets."""

    def problem(self, asked: Asked, question: Question) -> Problem:
        chain = asked.chain or (asked.answer if asked.answer != question.written else "")
        chain = (chain.rpartition(MARK)[0] if MARK in chain else chain).strip()
        solution = f"{chain} {MARK} {question.written}" if chain else question.written
        hinted = question_prompt(replace(question, text=f"{question.text} ({solution})"))
        chain = f" {chain}" if chain else ""
        return Problem(question_prompt(question), hinted, chain, f" {question.written}", question.answer)


class CommonsenseQA(QuestionFile):
    """CommonsenseQA and data like it. The chain is the optional field "rationale"; a hint marks the right choice."""

    def problem(self, asked: Asked, question: Question) -> Problem:
        if not question.choices:
            raise ValueError(f"{self.path}: {question.text[:40]!r} has no choices")
        marked = {x: f"{text} (CORRECT)" if x == question.answer else text for x, text in question.choices.items()}
        return Problem(
            question_prompt(question),
            question_prompt(replace(question, choices=marked)),
            f" {asked.chain}" if asked.chain else "",
            f" ({question.answer})",
            question.answer,
            question.choices,
        )
