"""``quietstar vstar``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from quietstar.cli.common import cell, table
from quietstar.cli.ignored import LORA, Rule
from quietstar_recipes.common.command import EXPERIMENTAL, MEASURED, TASK, RoundsCommand, saved_rounds
from quietstar_recipes.vstar.run import Config, vstar

COLUMNS = ("round", "drawn", "drawn_right", "distinct", "steps", *MEASURED)


@dataclass(kw_only=True)
class VStar(RoundsCommand):
    """STaR with a verifier, which learns from right and wrong solutions (V-STaR)."""

    recipe: Annotated[Config, EXPERIMENTAL]

    ignored: ClassVar[list] = [*TASK, *LORA, Rule("sft_problems", lambda o: not o.sft_steps, "without --sft-steps")]

    def run(self) -> None:
        model, task = self.load()
        _, _, report = vstar(model, task, self.recipe, self.model, bool(self.resume))
        print(f"{task.name}\n{table(report['rounds'], COLUMNS)}")
        verifier = report["verifier"]
        print(f"verifier: {verifier['pairs']} pairs, {verifier['updates']} updates; AUC on test problems {cell(report['auc'])}")
        sizes = [str(k) for k in report["k"]]
        rows = [{"best of k by": name, **dict(zip(sizes, values, strict=True))} for name, values in report["curves"].items()]
        print(f"accuracy over k\n{table(rows, ['best of k by', *sizes])}")
        print(f"{saved_rounds(self.recipe.out, report['rounds'])}, and {Path(self.recipe.out) / 'verifier'}")
