"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from quietstar.cli.errors import UsageError
from quietstar.config import Dtype

Checkpoint = Annotated[str, arg(help="a checkpoint, a run's folder (its newest checkpoint), or a hub name")]
LanguageModel = Annotated[str, arg(help="hub name or folder of a causal language model")]
StartModel = Annotated[str, arg(help="hub name or folder of a causal language model; default a small untrained one")]
WeightsDtype = Annotated[Dtype, arg(help="dtype of the weights; use half precision only with LoRA, or without training")]
AllowBin = Annotated[bool, arg(help="take weights from pickle files (.bin) too, read with weights_only")]
ThinkWhen = Annotated[str, arg(help="always, never, or only where the model's entropy is above this number of nats")]
ResumeRun = Annotated[Literal["", "auto"], arg(help="continue the run in --out; --resume alone is the same as --resume auto")]


def read_think(think: str) -> str | float:
    """``think`` as ``QuietStar.generate`` takes it."""
    if think in ("always", "never"):
        return think
    try:
        nats = float(think)
    except ValueError:
        nats = -1
    if not 0 <= nats < float("inf"):
        raise UsageError(f"--think must be always, never or a number of nats, 0 or more, got {think}")
    return nats


def check_report_file(out: str, source: str) -> None:
    """Refuse an ``--out`` that can't hold JSON, or would overwrite the texts or questions of ``source``."""
    path = Path(out)
    if not path.parent.is_dir() or path.is_dir() or path.suffix in (".md", ".png"):
        raise UsageError(f"--out must be a JSON file in an existing folder, got {out}")
    if path.exists() and path.resolve() == Path(source).resolve():
        raise UsageError(f"--out must be another file than {source}")


def check_start(model: str, sft_steps: int) -> None:
    if not (model or sft_steps):
        raise ValueError("a model from scratch solves nothing: --sft-steps teaches it the data's chains, or name a --model")
