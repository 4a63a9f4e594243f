"""``quietstar star``"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from quietstar.cli.common import table
from quietstar.cli.ignored import LORA, Rule
from quietstar_recipes.common.command import EXPERIMENTAL, MEASURED, TASK, RoundsCommand, saved_rounds
from quietstar_recipes.star.run import Config, star

COLUMNS = ("round", "tried", "kept", "rationalised", *MEASURED)


@dataclass(kw_only=True)
class Star(RoundsCommand):
    """Train a model on its own chains of thought that lead to right answers (STaR)."""

    recipe: Annotated[Config, EXPERIMENTAL]

    ignored: ClassVar[list] = [
        *TASK,
        *LORA,
        Rule("top_p", lambda o: o.temperature == 0, "with --temperature=0"),
        Rule("rationalize", lambda o: not o.filter, "with --no-filter, which keeps all chains"),
        Rule("rationale_check", lambda o: not (o.rationalize and o.filter), "without --rationalize"),
    ]

    def run(self) -> None:
        model, task = self.load()
        _, reports = star(model, task, self.recipe, self.model, bool(self.resume))
        print(f"{task.name}\n{table(reports, COLUMNS)}\n{saved_rounds(self.recipe.out, reports)}")
