"""Where a run's figures go besides its metrics: one of Accelerate's trackers."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from quietstar.config import TrainConfig
from quietstar.files.reading import read_utf8
from quietstar.files.writing import write_whole

PROJECT, RUN_ID = "quietstar", "wandb-run-id"


def check(config: TrainConfig) -> None:
    """Raises ValueError if the tracker of ``config`` is unknown or not installed."""
    if config.tracker and not filter_trackers([config.tracker], config.out):  # Accelerate passes over it
        raise ValueError(f"train: tracker={config.tracker!r}, and its package isn't installed")


def begin(accelerator: Accelerator, config: TrainConfig, again: bool) -> None:
    """Begin to track a run or, if it is resumed, go on ``again`` with what wandb has of it.

    wandb's variables win: WANDB_PROJECT, WANDB_NAME and WANDB_RUN_ID. By default a run is named after its folder.
    """
    project, options = PROJECT, {}
    if config.tracker == "wandb":
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        if accelerator.is_main_process:
            options = {"wandb": _wandb(Path(config.out), again)}
    accelerator.init_trackers(project, config=config.__dict__.copy(), init_kwargs=options)


def _wandb(out: Path, again: bool) -> dict[str, Any]:
    file = out / RUN_ID
    number = os.environ.get("WANDB_RUN_ID") or (read_utf8(file).strip() if again and file.exists() else uuid.uuid4().hex[:8])
    out.mkdir(parents=True, exist_ok=True)
    write_whole(file, number + "\n")
    return {"id": number, "resume": "allow", "name": os.environ.get("WANDB_NAME") or out.resolve().name}
