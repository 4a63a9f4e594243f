"""``quietstar score``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from quietstar.cli.common import table
from quietstar.cli.ignored import Rule
from quietstar_recipes.common.command import EXPERIMENTAL, TASK, ResumeRun, TaskCommand
from quietstar_recipes.score.run import MODEL, Config, score

COLUMNS = ("accuracy_first", "accuracy_second", "delta", "low", "high", "fixed", "broken", "revised")


@dataclass(kw_only=True)
class Score(TaskCommand):
    """Teach a model to correct its own answers, by reinforcement learning (SCoRe)."""

    recipe: Annotated[Config, EXPERIMENTAL]
    model: Annotated[str, arg(help="hub name or folder of a causal language model that solves some of the problems")]
    resume: ResumeRun = ""

    ignored: ClassVar[list] = [
        *TASK,
        Rule("two_turn_problems two_turn_rate", lambda o: not o.two_turn_steps, "without --two-turn-steps"),
        Rule("first_kl", lambda o: not o.first_steps, "with --first-steps=0"),
        Rule("bonus", lambda o: not o.second_steps, "with --second-steps=0"),
        Rule("bonus credit", lambda o: o.single_turn, "with --single-turn"),
    ]

    def run(self) -> None:
        model, task = self.load()
        _, report = score(model, task, self.recipe, self.model, bool(self.resume))
        later = [f"attempt {number}" for number in range(3, self.recipe.attempts + 1)]
        rows = [
            {"test_problems": name, **figures, **dict(zip(later, figures["accuracy_by_attempt"][2:], strict=True))}
            for name, figures in report.items()
        ]
        columns = ("test_problems", *COLUMNS, *later)
        print(f"{task.name}; fixed and broken are shares of all problems\n{table(rows, columns)}")
        print(f"saved {Path(self.recipe.out) / MODEL}")
