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

PROJECT = "quietstar"


def check(config: TrainConfig) -> None:
    """Raises ValueError if the tracker of ``config`` is unknown or not installed, or if only its project or name is given."""
    for option in ("tracker_project", "tracker_name"):
        if getattr(config, option) and not config.tracker:
            raise ValueError(f"train: {option} needs a tracker, got {getattr(config, option)!r} alone")
    if config.tracker and not filter_trackers([config.tracker], config.out):  # Accelerate passes over it
        raise ValueError(f"train: tracker={config.tracker!r}, and its package isn't installed")


def begin(accelerator: Accelerator, config: TrainConfig, again: bool, done: int) -> None:
    """Begin to track a run or, if it is resumed, go on ``again`` after ``done`` steps with what the tracker has of it.

    wandb's variables are its defaults: WANDB_PROJECT, WANDB_NAME and WANDB_RUN_ID. wandb, trackio and mlflow know a run by an
    id, which is kept in the run's folder.
    """
    kind, out, main = config.tracker, Path(config.out), accelerator.is_main_process
    project, name, chosen = (os.environ.get(f"WANDB_{x}") if kind == "wandb" else None for x in ("PROJECT", "NAME", "RUN_ID"))
    name = config.tracker_name or name or out.resolve().name
    file = out / f"{kind}-run-id"
    saved = chosen or (read_utf8(file).strip() if again and main and file.exists() else None)
    number = saved or uuid.uuid4().hex[:8]
    options: dict[str, dict[str, Any]] = {
        "wandb": {"id": number, "resume": "allow", "name": name},
        "trackio": {"resume": "allow", "name": f"{name}-{number}"},  # it finds a run by its name
        "mlflow": {"run_id": saved, "run_name": name},  # it makes the id
        "tensorboard": {"purge_step": done + 1},  # of what was logged after the checkpoint
    }
    changes = not (kind == "mlflow" and saved)  # its runs keep the values that they began with
    accelerator.init_trackers(
        config.tracker_project or project or PROJECT, config=config.__dict__.copy() if changes else None, init_kwargs=options
    )
    if main and kind in ("wandb", "trackio", "mlflow"):
        if kind == "mlflow":
            number = accelerator.get_tracker(kind, unwrap=True).info.run_id
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, number + "\n")
