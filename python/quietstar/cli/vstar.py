"""``quietstar vstar``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quietstar.cli.rounds import MEASURED, saved_rounds
from quietstar.cli.shared_options import AllowBin, ResumeRun, StartModel, WeightsDtype, check_out_folder, check_start
from quietstar.cli.tables import cell, table
from quietstar.recipes import vstar
from quietstar.recipes.common.models import TaskConfig, load

COLUMNS = ("round", "drawn", "drawn_right", "distinct", "steps", *MEASURED)


@dataclass
class VStar:
    """STaR with a verifier, which learns from right and wrong solutions (V-STaR)."""

    task: TaskConfig
    recipe: vstar.Config
    model: StartModel = ""
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False
    resume: ResumeRun = ""

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        check_start(self.model, self.recipe.sft_steps)
        model, task = load(self.model, self.task, self.dtype, self.allow_bin)
        _, _, report = vstar.vstar(model, task, self.recipe, self.model, bool(self.resume))
        print(f"{task.name}\n{table(report['rounds'], COLUMNS)}")
        verifier = report["verifier"]
        print(f"verifier: {verifier['pairs']} pairs, {verifier['updates']} updates; AUC on test problems {cell(report['auc'])}")
        sizes = [str(k) for k in report["k"]]
        rows = [{"best of k by": name, **dict(zip(sizes, values, strict=True))} for name, values in report["curves"].items()]
        print(f"accuracy over k\n{table(rows, ['best of k by', *sizes])}")
        print(f"{saved_rounds(self.recipe.out, report['rounds'])}, and {Path(self.recipe.out) / 'verifier'}")
