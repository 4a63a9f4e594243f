"""What a run must have in common with its continuation, and which checkpoint it continues from.

A setting may differ if its field says so (``quietstar.config.option(..., may_differ=True)``); all others must be the same.
The training loop, the recipes and the command line compare them with ``Settings``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from tqdm.auto import tqdm

from quietstar.checkpoints import places
from quietstar.checkpoints.places import RUN
from quietstar.config import ThoughtConfig, TrainConfig, read_thought_config
from quietstar.files.reading import read_json

# What a run leaves in its folder: ``quietstar train``, a recipe that saves between updates, one that saves between rounds.
MARKS = ("checkpoints", "progress", "recipe.json")


class SavedConfig(msgspec.Struct):
    """The configs in run.json, by the names of their fields."""

    train: dict[str, Any]
    thoughts: dict[str, Any]


class RunFile(msgspec.Struct):
    """run.json, in each checkpoint"""

    step: Annotated[int, msgspec.Meta(ge=0)]
    config: SavedConfig
    optimizer: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Settings:
    """The settings that a run and its continuation must have in common."""

    values: dict[str, Any]  # JSON values by name; "inputs" has hashes of what is read again, by what to call it

    @classmethod
    def of(cls, *configs: Any, **others: Any) -> Settings:
        """The fields of dataclasses, apart from those that may differ and those that are dataclasses themselves."""
        for config in configs:
            for field in dataclasses.fields(config):
                value = getattr(config, field.name)
                if field.metadata.get("may_differ") or dataclasses.is_dataclass(value):
                    continue
                others[field.name] = value
        return cls(json.loads(json.dumps(others)))

    def check(self, path: str | os.PathLike, saved: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the first setting whose value differs in the run in ``path``."""
        check_inputs(path, saved.get("inputs", {}), self.values.get("inputs", {}))
        for name, value in self.values.items():
            if name != "inputs" and saved.get(name) != value:
                raise ValueError(f"{path}: the run there has {name}={saved.get(name)!r}, not {value!r}")


def check_inputs(path: str | os.PathLike, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ValueError, naming the first input whose hash is another than that of the run in ``path``."""
    for what, digest in now.items():
        if saved.get(what, digest) != digest:
            raise ValueError(f"{path}: {what} has changed since the run began: resume needs it as it was")


def tokens_hash(examples: Sequence[Mapping[str, Any]]) -> str:
    """A hash of the examples' tokens, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for example in examples:
        found.update(str(torch.as_tensor(example["input_ids"]).tolist()).encode())
    return found.hexdigest()


def check_folder(out: str | os.PathLike, mark: str, begun: bool, resume: bool) -> None:
    """Check that a run may write to ``out``.

    Args:
        mark: which of ``MARKS`` this kind of run leaves.
        begun: whether a run of this kind is there.
        resume: whether to continue it.
    """
    for other in MARKS:
        if other != mark and (Path(out) / other).exists():
            raise ValueError(f"{out}: a run of another command is there, with {other}: take another out")
    if begun and not resume:
        raise ValueError(f"{out}: a run is there already; resume continues it, another out starts a new one")


def find_checkpoint(resume: str | os.PathLike | None, config: TrainConfig, thoughts: ThoughtConfig) -> Path | None:
    """The checkpoint that a run continues from; None to start at the beginning.

    Args:
        resume: "auto" for the newest whole checkpoint of ``config.out``, if there is one; or the path of a checkpoint.
    """
    path: Path | None
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            raise ValueError(f"train: no checkpoint at {path}")
        places.check(path)
    elif paths := places.every(config.out):
        path = places.newest_whole(paths, on_damaged=lambda error: tqdm.write(f"{error}; trying the one before"))
        if path is None:
            raise ValueError(f"train: every checkpoint of {config.out} is damaged")
    else:
        return None
    run = read_json(path / RUN, RunFile)
    saved_thoughts = read_thought_config(run.config.thoughts, f"{path}: {RUN}")
    saved = run.config.train | saved_thoughts.to_dict()
    steps = saved.get("steps")
    if config.schedule == "constant":  # no step depends on how many there are
        steps = config.steps
        if steps < run.step:
            raise ValueError(f"{path}: the run there is at step {run.step} already, after steps={steps}")
    elif steps != config.steps:
        why = f"with schedule={config.schedule!r}, the learning rate of each step depends on it"
        raise ValueError(f"{path}: the run there has steps={steps}, not {config.steps}: {why}")
    Settings.of(config, thoughts).check(path, saved | {"steps": steps})
    return path
