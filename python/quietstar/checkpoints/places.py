"""Where checkpoints are: a run's folder has them in folders called by their steps, a recipe's run under a name.

<run>/checkpoints/step-000050/   of ``quietstar train``
<run>/best, <run>/model          of a recipe: its best round, or its result
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["checkpoint_of", "every", "folder", "run_of"]

# Whatever else a user keeps beside them is never read, renamed or removed.
_NAME = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,})")
RESULTS = ("best", "model")
CONFIG = "config.json"


def folder(out: str | os.PathLike, step: int) -> Path:
    """The checkpoint of a run after ``step`` steps."""
    return Path(out) / "checkpoints" / f"step-{step:06d}"


def every(out: str | os.PathLike) -> list[Path]:
    """The run's checkpoints, oldest first: folders called step-<number>, and nothing else that is there."""
    checkpoints = Path(out) / "checkpoints"
    steps = sorted(int(found[1]) for path in checkpoints.glob("step-*") if (found := _NAME.fullmatch(path.name)))
    return [path for step in steps if is_folder(path := folder(out, step))]


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def checkpoint_of(name: str | os.PathLike) -> str:
    """The checkpoint that a name stands for: of a run's folder its newest, of a recipe's the best, else the name itself.

    Raises:
        ValueError: the name is that of a folder, by its form or because its first part is one, and there is none.
    """
    text = os.fspath(name)
    path = Path(text)
    if not os.path.exists(text):
        if _is_local(text):
            raise ValueError(f"{text}: there is no such folder")
        return text
    if checkpoints := every(path):
        return str(checkpoints[-1])
    if (path / CONFIG).is_file():
        return text
    return next((str(path / result) for result in RESULTS if (path / result / CONFIG).is_file()), text)


def run_of(name: str | os.PathLike) -> Path | None:
    """The run's folder that a checkpoint, or a run's folder itself, is in; None if it is in none."""
    checkpoint = Path(checkpoint_of(name))
    in_run = _NAME.fullmatch(checkpoint.name) and checkpoint.parent.name == "checkpoints"
    return checkpoint.parent.parent if in_run else None


def _is_local(name: str) -> bool:
    """Whether a name can't be one on the hub, or stands for a folder here more likely than for one there."""
    first = name.split("/")[0]
    return name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name or ("/" in name and os.path.isdir(first))
