"""Problems read from .jsonl files of questions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.evaluation.questions import reading as questions
from quietstar.evaluation.questions.answers import STOP, extract
from quietstar.files.reading import json_lines
from quietstar.recipes.tasks.base import Problem, Row, Task
from quietstar.recipes.tasks.marks import MARK
from quietstar.recipes.tasks.splits import SPLITS, split_of


class QuestionFile(Task):
    """Problems from a .jsonl file, or from a folder's train.jsonl and test.jsonl.

    Raises:
        ValueError: a missing file, a file without questions, a malformed line, or a question without an answer; names the line.
    """

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
            problem = self.problem(row, questions.question_of(row, f"{path}: line {number}"))
            rows.append((split_of(problem.prompt), problem))
        if not rows:
            raise ValueError(f"{path}: there is no question in it")
        return rows

    @abstractmethod
    def problem(self, row: questions.Row, question: questions.Question) -> Problem:
        """The problem of one line of the file."""


def shuffled(problems: Sequence[Problem], generator: torch.Generator) -> list[Problem]:
    return [problems[i] for i in torch.randperm(len(problems), generator=generator).tolist()]
