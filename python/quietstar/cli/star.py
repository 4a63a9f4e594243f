"""``quietstar star``"""

from __future__ import annotations

from dataclasses import dataclass

from quietstar.cli.rounds import MEASURED, saved_rounds
from quietstar.cli.shared_options import AllowBin, ResumeRun, StartModel, WeightsDtype, check_out_folder, check_start
from quietstar.cli.tables import table
from quietstar.recipes import star
from quietstar.recipes.common.models import TaskConfig, load

COLUMNS = ("round", "tried", "kept", "rationalised", "failed", "steps", *MEASURED)


@dataclass
class Star:
    """Train a model on its own chains of thought that lead to right answers (STaR)."""

    task: TaskConfig
    recipe: star.Config
    model: StartModel = ""
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False
    resume: ResumeRun = ""

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        check_start(self.model, self.recipe.sft_steps)
        model, task = load(self.model, self.task, self.dtype, self.allow_bin)
        _, reports = star.star(model, task, self.recipe, self.model, bool(self.resume))
        print(f"{task.name}\n{table(reports, COLUMNS)}\n{saved_rounds(self.recipe.out, reports)}")
