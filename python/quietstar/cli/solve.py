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
    """Compare uses of more tokens on test problems: votes, best of k, search, revisions."""

    task: TaskConfig
    recipe: solve.Config
    model: Annotated[str, arg(help="hub name or folder of a causal language model, such as a round of star or vstar")]
    verifier: Annotated[str, arg(help="the verifier of a vstar run; default none")] = ""
    process_verifier: Annotated[str, arg(help="the folder process of another run of solve, instead of training one")] = ""
    larger: Annotated[str, arg(help="a larger model to compare with, at equal FLOPs; default none")] = ""
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        model, task = load(self.model, self.task, self.dtype, self.allow_bin)
        verifier = load_verifier(self.verifier, self.model, model, task) if self.verifier else None
        scorer = likelihood_scorer(verifier, self.recipe.batch_size) if verifier else None
        process = load_verifier(self.process_verifier, self.model, model, task) if self.process_verifier else None
        larger = load(self.larger, self.task, self.dtype, self.allow_bin) if self.larger else None
        report = solve.solve(model, task, self.recipe, scorer, process, larger)
        rows = [{"method": "greedy", **report["greedy"]}]
        rows += [{"method": "larger model, greedy", **report["larger"]["greedy"]}] if larger else []
        rows += [{"method": name, **point} for name, points in report["curves"].items() for point in points]
        print(f"{task.name}, {report['problems']} test problems; budget and tokens are per problem")
        print(table(rows, ("method", "budget", "tokens", "accuracy", "low", "high")))
        if chosen := report.get("chosen"):
            print("chosen on validation problems for the largest budget, and its accuracy on test problems")
            shown = [{**row, "accuracy": row["accuracy"][row["chosen"]]} for row in chosen]
            print(table(shown, ("kind", "bins", "difficulty", "problems", "chosen", "accuracy")))
        print(f"wrote {Path(self.recipe.out) / 'test_time.json'}")
