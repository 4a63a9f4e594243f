"""What the recipes' commands share: options, checks of them, and the lines that they print at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from quietstar.cli.ignored import Rule
from quietstar_recipes.common.saving import BEST, best_round

LanguageModel = Annotated[str, arg(help="hub name, folder or GGUF file of a causal language model")]
StartModel = Annotated[str, arg(help="hub name, folder or GGUF file of a causal language model; default a small untrained one")]
ResumeRun = Annotated[Literal["", "auto"], arg(help="continue the run in --out; --resume alone is the same as --resume auto")]

MEASURED = ("valid_accuracy", "accuracy", "low", "high", "tokens")  # columns of a round's figures
TASK = [Rule("digits", lambda o: o.task in ("stories", "gsm8k", "csqa"), "with --task=stories, gsm8k or csqa")]


def check_start(model: str, sft_steps: int) -> None:
    if not (model or sft_steps):
        raise ValueError("a model from scratch solves nothing: --sft-steps teaches it the data's chains, or name a --model")


def saved_rounds(out: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Which round of a recipe is best, and where it is."""
    best = best_round(reports)
    folder, report = Path(out) / f"round-{best:02d}", reports[best]
    link = Path(out) / BEST
    saved = f"{link}, which is {folder.name}" if link.is_symlink() else str(folder)
    return (
        f"best on validation problems: round {best}, which solves {report['accuracy']:.1%} of the test problems\nsaved {saved}"
    )
