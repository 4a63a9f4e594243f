"""``quietstar score``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from quietstar.cli.shared_options import AllowBin, ResumeRun, WeightsDtype, check_out_folder
from quietstar.cli.tables import table
from quietstar.recipes import score
from quietstar.recipes.common.models import TaskConfig, load

COLUMNS = ("accuracy_first", "accuracy_second", "delta", "low", "high", "fixed", "broken", "revised", "edited")


@dataclass
class Score:
    """Teach a model to correct its own answers, by reinforcement learning (SCoRe)."""

    task: TaskConfig
    recipe: score.Config
    model: Annotated[str, arg(help="hub name or folder of a causal language model that solves some of the problems")]
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False
    resume: ResumeRun = ""

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        model, task = load(self.model, self.task, self.dtype, self.allow_bin)
        _, report = score.score(model, task, self.recipe, self.model, bool(self.resume))
        later = [f"attempt {number}" for number in range(3, self.recipe.attempts + 1)]
        rows = [
            {"test problems": name, **figures, **dict(zip(later, figures["accuracy_by_attempt"][2:], strict=True))}
            for name, figures in report.items()
        ]
        columns = ("test problems", *COLUMNS, *later)
        print(f"{task.name}; fixed and broken are shares of all problems\n{table(rows, columns)}")
        print(f"saved {Path(self.recipe.out) / score.MODEL}")
