"""``quietstar ask``"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from quietstar.cli.errors import UsageError
from quietstar.cli.loading import load_checkpoint, text_tokenizer
from quietstar.cli.shared_options import Checkpoint, ThinkWhen, check_report_file, read_think
from quietstar.evaluation.questions.asking import Asking, ask
from quietstar.evaluation.questions.reading import read_questions


@dataclass
class Ask:
    """Ask questions; measure how many are answered right, with thoughts and without."""

    model: Checkpoint
    questions: Annotated[str, arg(help="a .jsonl file of questions and answers, a hub name, or name:subset on the hub")]
    questions_split: Annotated[str, arg(help="split of a hub data set")] = "test"
    limit: Annotated[int | None, arg(help="how many questions to ask, from the start; default all")] = None
    think: ThinkWhen = "always"
    max_new_tokens: Annotated[int, arg(help="most tokens of an answer")] = 256
    answer_prefix: Annotated[str, arg(help='how an answer begins, such as " Let\'s think step by step."')] = ""
    votes: Annotated[int, arg(help="answers to sample for a majority vote on each question; 0 for no vote")] = 0
    temperature: Annotated[float, arg(help="temperature of the answers that vote")] = 0.7
    seed: Annotated[int, arg(help="seed of the answers that vote")] = 0
    batch_size: Annotated[int, arg(help="questions at a time")] = 8
    out: Annotated[str, arg(help="JSON file of the results; a page gets the same name with .md")] = "ask.json"

    def run(self) -> None:
        check_report_file(self.out, self.questions)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be 1 or more, got {self.limit}")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more, got {self.batch_size}")
        try:
            asking = Asking(
                read_think(self.think),
                self.max_new_tokens,
                self.answer_prefix,
                self.votes,
                self.temperature,
                self.seed,
                self.batch_size,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        questions = read_questions(self.questions, self.questions_split, self.limit)
        qs = load_checkpoint(self.model)
        text_tokenizer(qs)
        report = ask(qs, questions, asking, sys.stderr.isatty())
        written = report.save(self.out)
        print(f"{len(questions):,} questions\n{report.table}\nwrote {' and '.join(map(str, written))}")
