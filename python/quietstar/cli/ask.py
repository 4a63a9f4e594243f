"""``quietstar ask``"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from tyro.conf import arg

from quietstar.checkpoints.native import thinks
from quietstar.cli.common import Checkpoint, check_report_file, load_checkpoint, text_tokenizer
from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import Rule
from quietstar.data.sources import from_hub, names
from quietstar.evaluation.questions.asking import Asking, ask
from quietstar.evaluation.questions.reading import read_questions


@dataclass
class Ask:
    """Ask questions; measure how many are answered right, with thoughts and without; a plain language model has none."""

    model: Checkpoint
    asking: Asking
    questions: Annotated[str, arg(help="questions and answers: files or hub names, as --data of train takes them")]
    questions_split: Annotated[str, arg(help="split of a hub data set")] = "test"
    limit: Annotated[int | None, arg(help="how many questions to ask, from the start; default all")] = None
    out: Annotated[str, arg(help="JSON file of the results; a page gets the same name with .md")] = "ask.json"

    ignored: ClassVar[list] = [
        Rule("questions_split", lambda o: not any(map(from_hub, names(o.questions))), "with a file"),
        Rule("temperature seed", lambda o: not o.votes, "without --votes"),
    ]

    def run(self) -> None:
        check_report_file(self.out, self.questions)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be 1 or more, got {self.limit}")
        questions = read_questions(self.questions, self.questions_split, self.limit)
        plain = not thinks(self.model)
        qs = load_checkpoint(self.model, plain)
        text_tokenizer(qs)
        if plain:
            print(f"{self.model} is a plain language model, asked without thoughts")
        report = ask(qs, questions, replace(self.asking, think="never") if plain else self.asking, sys.stderr.isatty())
        written = report.save(self.out)
        print(f"{len(questions):,} questions\n{report.table}\nwrote {' and '.join(map(str, written))}")
