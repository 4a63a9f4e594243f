"""``quietstar solve``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from quietstar.cli.shared_options import AllowBin, WeightsDtype, check_out_folder
from quietstar.cli.tables import table
from quietstar.recipes import solve
from quietstar.recipes.common.models import TaskConfig, load
from quietstar.recipes.common.solutions import likelihood_scorer
from quietstar.recipes.vstar_verifier import load_verifier


@dataclass
class Solve:
    """Compare uses of more tokens on test problems: votes, best of k, revisions."""

    task: TaskConfig
    recipe: solve.Config
    model: Annotated[str, arg(help="hub name or folder of a causal language model, such as a round of star or vstar")]
    verifier: Annotated[str, arg(help="the verifier of a vstar run; default none")] = ""
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        model, task = load(self.model, self.task, self.dtype, self.allow_bin)
        verifier = load_verifier(self.verifier, self.model, model, task) if self.verifier else None
        scorer = likelihood_scorer(verifier, self.recipe.batch_size) if verifier else None
        report = solve.solve(model, task, self.recipe, scorer)
        rows = [{"method": "greedy", **report["greedy"]}]
        rows += [{"method": name, **point} for name, points in report["curves"].items() for point in points]
        print(f"{task.name}, {report['problems']} test problems; budget and tokens are per problem")
        print(table(rows, ("method", "budget", "tokens", "accuracy", "low", "high")))
        if splits := [{**row, **row["accuracy"]} for row in report.get("splits", [])]:
            print("accuracy at the largest budget, by attempts in a chain")
            print(table(splits, ("bins", "difficulty", "problems", "chosen", *splits[0]["accuracy"])))
        print(f"wrote {Path(self.recipe.out) / 'test_time.json'}")
