"""``quietstar internalize``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from quietstar.cli.shared_options import AllowBin, ResumeRun, StartModel, WeightsDtype, check_out_folder
from quietstar.cli.tables import table
from quietstar.recipes import internalize, internalize_kd
from quietstar.recipes.common.models import TaskConfig, load

COLUMNS = ("accuracy", "low", "high", "tokens", "tokens_per_second", "problems_per_second")


@dataclass
class Internalize:
    """Train a model to answer without writing its chain of thought (ICoT)."""

    task: TaskConfig
    recipe: internalize.Config
    distillation: internalize_kd.Config
    method: Annotated[
        Literal["stepwise", "kd"], arg(help="stepwise: remove the chain token by token (ICoT-SI); kd: distil it (ICoT-KD)")
    ] = "stepwise"
    model: StartModel = ""
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False
    resume: ResumeRun = ""

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        model, task = load(self.model, self.task, self.dtype, self.allow_bin)
        if self.method == "kd":
            _, report = internalize_kd.distill(model, task, self.recipe, self.distillation, self.model, bool(self.resume))
            rows, saved = ["full chain", "shown states", "emulated states", "internalized"], internalize_kd.PAIR
        else:
            _, report = internalize.internalize(model, task, self.recipe, self.model, bool(self.resume))
            print(table(report["stages"], ("removed", "steps", *COLUMNS)))
            rows, saved = ["full chain", "no chain", "internalized"], internalize.MODEL
        named = [{"test problems": name, **report[name]} for name in rows if name in report]
        print(f"{task.name}\n{table(named, ('test problems', *COLUMNS))}")
        print(f"saved {Path(self.recipe.out) / saved}")
