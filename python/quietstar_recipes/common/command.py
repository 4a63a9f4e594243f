"""What the recipes' commands share: options, checks of them, and the lines that they print at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from transformers import PreTrainedModel
from tyro.conf import arg

from quietstar.cli.common import AllowBin, WeightsDtype, check_out_folder
from quietstar.cli.ignored import Rule
from quietstar_recipes.common.models import TaskConfig, load
from quietstar_recipes.common.saving import BEST, best_round
from quietstar_recipes.tasks import Task

EXPERIMENTAL = arg(help="Experimental: interfaces may change.")
LanguageModel = Annotated[str, arg(help="hub name, folder or GGUF file of a causal language model")]
StartModel = Annotated[str, arg(help="hub name, folder or GGUF file of a causal language model; default a small untrained one")]
ResumeRun = Annotated[Literal["", "auto"], arg(help="continue the run in --out; --resume alone is the same as --resume auto")]

MEASURED = ("valid_accuracy", "accuracy", "low", "high", "tokens")  # columns of a round's figures
TASK = [Rule("digits", lambda o: o.task in ("stories", "gsm8k", "csqa"), "with --task=stories, gsm8k or csqa")]


@dataclass(kw_only=True)
class TaskCommand:
    """The options of a command that solves problems; those of its recipe have the type of its ``Config``."""

    task: TaskConfig
    recipe: Any
    model: str
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False

    ignored: ClassVar[list] = TASK

    def load(self) -> tuple[PreTrainedModel, Task]:
        """The model and the task, once ``--out`` is known to be a folder that can be written to."""
        check_out_folder(self.recipe.out)
        return load(self.model, self.task, self.dtype, self.allow_bin)


@dataclass(kw_only=True)
class StartCommand(TaskCommand):
    """A command that may start with a small untrained model, and whose run can be continued."""

    model: StartModel = ""
    resume: ResumeRun = ""


class RoundsCommand(StartCommand):
    """A command of a recipe in rounds, whose first model must solve some problems."""

    def load(self) -> tuple[PreTrainedModel, Task]:
        if not (self.model or self.recipe.sft_steps):
            raise ValueError("a model from scratch solves nothing: --sft-steps teaches it the data's chains, or name a --model")
        return super().load()


def saved_rounds(out: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Which round of a recipe is best, and where it is."""
    best = best_round(reports)
    folder, report = Path(out) / f"round-{best:02d}", reports[best]
    link = Path(out) / BEST
    saved = f"{link}, which is {folder.name}" if link.is_symlink() else str(folder)
    return (
        f"best on validation problems: round {best}, which solves {report['accuracy']:.1%} of the test problems\nsaved {saved}"
    )
