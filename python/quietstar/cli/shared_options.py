"""Options that several commands take."""

from __future__ import annotations

import os
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
Controls = Annotated[
    bool, arg(help="predict with another text's thoughts too, to tell the gain of content from that of mixing")
]


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


def check_out_file(out: str, source: str = "", what: str = "a file") -> None:
    """Refuse an ``--out`` that can't be written, before hours of work are lost by it, or that would overwrite ``source``."""
    path, wanted = Path(out), f"--out must be {what} in an existing folder, got {out}"
    if not path.name or (os.path.lexists(path) and not path.is_file()):
        raise UsageError(wanted)
    trial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        trial.touch()
        trial.unlink()
    except FileNotFoundError as error:
        raise UsageError(wanted) from error
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise UsageError(f"--out must be another file than {source}")


def check_report_file(out: str, source: str) -> None:
    """``check_out_file`` for JSON, beside which a page or a plot gets the same name."""
    if Path(out).suffix in (".md", ".png"):
        raise UsageError(f"--out must be a JSON file in an existing folder, got {out}")
    check_out_file(out, source, "a JSON file")


def check_out_folder(out: str) -> None:
    """Refuse an ``--out`` that is no folder and can't become one."""
    path = Path(out)
    try:
        while path.name and not (path.exists() or path.is_symlink()):
            path = path.parent
        fits = path.is_dir() and os.access(path, os.W_OK)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    if not fits:
        raise UsageError(f"--out must be a folder that can be written to, got {out}")


def check_seed(seed: int | None) -> None:
    if seed is not None and not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 4,294,967,295, got {seed}")


def check_start(model: str, sft_steps: int) -> None:
    if not (model or sft_steps):
        raise ValueError("a model from scratch solves nothing: --sft-steps teaches it the data's chains, or name a --model")
