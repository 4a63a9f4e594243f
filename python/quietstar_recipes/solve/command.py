"""``quietstar solve``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from quietstar.cli.common import table
from quietstar.cli.ignored import LORA, Rule
from quietstar_recipes.common.command import EXPERIMENTAL, TASK, TaskCommand
from quietstar_recipes.common.models import load
from quietstar_recipes.common.solutions import likelihood_scorer
from quietstar_recipes.solve.run import Config, solve
from quietstar_recipes.vstar.verifier import load_verifier

SFT = "learning_rate warmup weight_decay clip batch_tokens lora_rank lora_targets lora_alpha lora_dropout"


def revises(o: Any) -> bool:
    return bool(o.attempts and (o.revise_steps or o.judge_steps))


def trains_process(o: Any) -> bool:
    return bool(o.process_steps and not o.process_verifier)


@dataclass(kw_only=True)
class Solve(TaskCommand):
    """Compare uses of more tokens on test problems: votes, best of k, search, revisions."""

    recipe: Annotated[Config, EXPERIMENTAL]
    model: Annotated[str, arg(help="hub name or folder of a causal language model, such as a round of star or vstar")]
    verifier: Annotated[str, arg(help="the verifier of a vstar run; default none")] = ""
    process_verifier: Annotated[str, arg(help="the folder process of another run of solve, instead of training one")] = ""
    larger: Annotated[str, arg(help="a larger model to compare with, at equal FLOPs; default none")] = ""

    ignored: ClassVar[list] = [
        *TASK,
        Rule("revise_steps judge_steps", lambda o: not o.attempts, "with --attempts=0"),
        Rule("revise_samples", lambda o: not (o.revise_steps and o.attempts), "without --revise-steps"),
        Rule("revise_problems", lambda o: not revises(o), "without --revise-steps or --judge-steps"),
        Rule("process_steps", lambda o: bool(o.process_verifier), "with --process-verifier"),
        Rule("process_problems process_samples rollouts", lambda o: not trains_process(o), "without --process-steps"),
        Rule(
            "beam_width lookahead",
            lambda o: not (o.process_steps or o.process_verifier),
            "without --process-steps or --process-verifier",
        ),
        Rule(SFT, lambda o: not (revises(o) or trains_process(o)), "without --revise-steps, --judge-steps or --process-steps"),
        *LORA,
    ]

    def run(self) -> None:
        model, task = self.load()
        verifier = load_verifier(self.verifier, self.model, model, task) if self.verifier else None
        scorer = likelihood_scorer(verifier, self.recipe.batch_size) if verifier else None
        process = load_verifier(self.process_verifier, self.model, model, task) if self.process_verifier else None
        larger = load(self.larger, self.task, self.dtype, self.allow_bin) if self.larger else None
        report = solve(model, task, self.recipe, scorer, process, larger)
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
