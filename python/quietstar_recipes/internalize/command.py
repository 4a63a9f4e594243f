"""``quietstar internalize``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from quietstar.cli.common import table
from quietstar.cli.ignored import Rule
from quietstar_recipes.common.command import EXPERIMENTAL, TASK, StartCommand
from quietstar_recipes.internalize import kd, stepwise

COLUMNS = ("accuracy", "low", "high", "tokens", "tokens_per_second", "problems_per_second")
STEPWISE = "steps_per_token final_steps smoothing reset_optimizer side remove_all_beyond keep_position"


@dataclass(kw_only=True)
class Internalize(StartCommand):
    """Train a model to answer without writing its chain of thought (ICoT)."""

    recipe: Annotated[stepwise.Config, EXPERIMENTAL]
    distillation: kd.Config
    method: Annotated[
        Literal["stepwise", "kd"], arg(help="stepwise: remove the chain token by token (ICoT-SI); kd: distil it (ICoT-KD)")
    ] = "stepwise"

    ignored: ClassVar[list] = [
        *TASK,
        Rule(f"{STEPWISE} compare eval_every", lambda o: o.method == "kd", "with --method=kd"),
        Rule(
            "student_steps emulator_steps coupled_steps coupled_rate components",
            lambda o: o.method != "kd",
            "without --method=kd",
        ),
        Rule(
            "explicit_steps smoothing reset_optimizer side",
            lambda o: o.method != "kd" and o.remove_all_beyond == 0,
            "with --remove-all-beyond=0",
        ),
        Rule("steps_per_token", lambda o: o.remove_all_beyond in (0, 1), "unless --remove-all-beyond is above 1"),
    ]

    def run(self) -> None:
        model, task = self.load()
        if self.method == "kd":
            _, report = kd.distill(model, task, self.recipe, self.distillation, self.model, bool(self.resume))
            rows, saved = ["full chain", "shown states", "emulated states", "internalized"], kd.PAIR
        else:
            _, report = stepwise.internalize(model, task, self.recipe, self.model, bool(self.resume))
            print(table(report["stages"], ("removed", "steps", *COLUMNS)))
            rows, saved = ["full chain", "no chain", "internalized"], stepwise.MODEL
        named = [{"test_problems": name, **report[name]} for name in rows if name in report]
        print(f"{task.name}\n{table(named, ('test_problems', *COLUMNS))}")
        print(f"saved {Path(self.recipe.out) / saved}")
