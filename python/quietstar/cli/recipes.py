"""The recipes' commands: ``quietstar star | vstar | solve | internalize | score | fast``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from quietstar import ThoughtConfig
from quietstar.config import Dtype
from quietstar.data.texts import DataConfig, load_data
from quietstar.recipes import fast, score, star, vstar
from quietstar.recipes import internalize as icot
from quietstar.recipes import internalize_kd as icot_kd
from quietstar.recipes import solve as test_time
from quietstar.recipes.common.models import TaskConfig, load, read
from quietstar.recipes.common.solutions import likelihood_scorer
from quietstar.recipes.vstar_verifier import load_verifier

Model = Annotated[str, arg(help="hub name or folder of a causal language model; default a small one from scratch")]
Weights = Annotated[Dtype, arg(help="of the weights; half precision is for adapters, and where nothing is trained")]
Resume = Annotated[str, arg(help="auto, as is --resume alone: go on with the run in --out, where it stopped")]


@dataclass
class Star:
    """Teach a model to reason from its own chains: keep those with the right answer, train a fresh copy on them (STaR)."""

    task: TaskConfig
    recipe: star.Config
    model: Model = ""
    dtype: Weights = "float32"
    resume: Resume = ""

    def run(self) -> None:
        check_start(self.model, self.recipe.sft_steps)
        model, task = load(self.model, self.task, self.dtype)
        _, reports = star.star(model, task, self.recipe, self.model, bool(self.resume))
        columns = ("round", "tried", "kept", "rationalised", "failed", "steps", "accuracy", "low", "high", "tokens", "seconds")
        print(f"{task.name}\n{table(reports, columns)}")
        print(f"saved {Path(self.recipe.out) / f'round-{len(reports) - 1:02d}'}")


@dataclass
class VStar:
    """STaR with a verifier that learns from right and wrong solutions, and picks the best of k when tested (V-STaR)."""

    task: TaskConfig
    recipe: vstar.Config
    model: Model = ""
    dtype: Weights = "float32"
    resume: Resume = ""

    def run(self) -> None:
        check_start(self.model, self.recipe.sft_steps)
        model, task = load(self.model, self.task, self.dtype)
        _, _, report = vstar.vstar(model, task, self.recipe, self.model, bool(self.resume))
        columns = ("round", "drawn", "drawn_right", "distinct", "steps", "accuracy", "low", "high", "tokens", "seconds")
        print(f"{task.name}\n{table(report['rounds'], columns)}")
        learnt = report["verifier"]
        print(f"verifier: {learnt['pairs']} pairs, {learnt['updates']} updates; AUC on test problems {_cell(report['auc'])}")
        points = [dict(zip(map(str, report["k"]), values, strict=True)) for values in report["curves"].values()]
        rows = [{"best of k by": name, **point} for name, point in zip(report["curves"], points, strict=True)]
        print(f"accuracy over k\n{table(rows, ['best of k by', *map(str, report['k'])])}")
        print(f"saved {Path(self.recipe.out) / f'round-{self.recipe.rounds:02d}'} and {Path(self.recipe.out) / 'verifier'}")


@dataclass
class Solve:
    """Spend more tokens on test problems: votes, best of k, chains of revisions, each at equal budgets; table and plot."""

    task: TaskConfig
    recipe: test_time.Config
    model: Annotated[str, arg(help="hub name or folder of a causal language model, such as a round of star or vstar")]
    verifier: Annotated[str, arg(help="the verifier of a vstar run; default none")] = ""
    dtype: Weights = "float32"

    def run(self) -> None:
        model, task = load(self.model, self.task, self.dtype)
        verifier = load_verifier(self.verifier, self.model, model, task) if self.verifier else None
        scorer = likelihood_scorer(verifier, self.recipe.batch_size) if verifier else None
        report = test_time.solve(model, task, self.recipe, scorer)
        rows = [{"method": "greedy", **report["greedy"]}]
        rows += [{"method": name, **point} for name, points in report["curves"].items() for point in points]
        print(f"{task.name}, {report['problems']} test problems; budget and tokens are of a problem")
        print(table(rows, ("method", "budget", "tokens", "accuracy", "low", "high")))
        if splits := [{**row, **row["accuracy"]} for row in report.get("splits", [])]:
            print("accuracy at the largest budget, by attempts in a chain")
            print(table(splits, ("bins", "difficulty", "problems", "chosen", *splits[0]["accuracy"])))
        print(f"wrote {Path(self.recipe.out) / 'test_time.json'}")


@dataclass
class Internalize:
    """Take a model's chain of thought away token by token, until it answers without one (ICoT-SI); or distil it (ICoT-KD)."""

    task: TaskConfig
    recipe: icot.Config
    distillation: icot_kd.Config
    method: Annotated[Literal["stepwise", "kd"], arg(help="kd: teacher, emulator and student; stages have no effect there")] = (
        "stepwise"
    )
    model: Model = ""
    dtype: Weights = "float32"
    resume: Resume = ""

    def run(self) -> None:
        model, task = load(self.model, self.task, self.dtype)
        columns = ("accuracy", "low", "high", "tokens", "tokens_per_second", "problems_per_second")
        if self.method == "kd":
            _, report = icot_kd.distill(model, task, self.recipe, self.distillation, self.model, bool(self.resume))
            rows, saved = ["full chain", "shown states", "emulated states", "internalized"], icot_kd.PAIR
        else:
            _, report = icot.internalize(model, task, self.recipe, self.model, bool(self.resume))
            print(table(report["stages"], ("removed", "steps", *columns)))
            rows, saved = ["full chain", "no chain", "internalized"], icot.MODEL
        named = [{"test problems": name, **report[name]} for name in rows if name in report]
        print(f"{task.name}\n{table(named, ('test problems', *columns))}")
        print(f"saved {Path(self.recipe.out) / saved}")


@dataclass
class Score:
    """Teach a model to correct its own answers, by reinforcement over two attempts at each problem (SCoRe)."""

    task: TaskConfig
    recipe: score.Config
    model: Annotated[str, arg(help="hub name or folder of a causal language model that solves some of the problems")]
    dtype: Weights = "float32"
    resume: Resume = ""

    def run(self) -> None:
        model, task = load(self.model, self.task, self.dtype)
        _, report = score.score(model, task, self.recipe, self.model, bool(self.resume))
        columns = ("accuracy_first", "accuracy_second", "delta", "low", "high", "fixed", "broken", "revised", "edited")
        rows = [{"test problems": name, **figures} for name, figures in report.items()]
        print(f"{task.name}; fixed and broken are shares of all problems\n{table(rows, ('test problems', *columns))}")
        print(f"saved {Path(self.recipe.out) / score.MODEL}")


@dataclass
class Fast:
    """Shorter and shorter thoughts, then a plain model without any (Fast Quiet-STaR); --curriculum sets T and J."""

    data: DataConfig
    thoughts: ThoughtConfig
    recipe: fast.Config
    model: Annotated[str, arg(help="hub name or folder of a causal language model")]
    dtype: Weights = "float32"
    resume: Resume = ""

    def run(self) -> None:
        model, tokenizer = read(self.model, self.dtype)
        data = load_data(self.data, tokenizer, max(J for _, J in fast.stages(self.recipe.curriculum)))
        _, report = fast.fast(
            model, data.train, data.held_out, self.thoughts, self.recipe, tokenizer, name=self.model, resume=bool(self.resume)
        )
        print(table(report["stages"], ("thought_tokens", "lookahead", "base", "mixed", "gain", "gain_low", "gain_high")))
        print("times as long for a generated token, 0 being without thoughts")
        print(table(report["speeds"], ("thought_tokens", "times_plain")))
        print(f"held-out loss without thoughts, nats a token: {report['base']:.4f} before, {report['plain']:.4f} after")
        print(f"saved {Path(self.recipe.out) / fast.MODEL}")


def check_start(model: str, sft_steps: int) -> None:
    if not (model or sft_steps):
        raise ValueError("a model from scratch solves nothing: --sft-steps teaches it the data's chains, or name a --model")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A line for each row; what a row lacks is left empty."""
    cells = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


COMMANDS = {"star": Star, "vstar": VStar, "solve": Solve, "internalize": Internalize, "score": Score, "fast": Fast}
