"""Checkpoints of a run. Each is written to a temporary folder, then renamed; a manifest tells which file is damaged, if any.

<run>/checkpoints/step-000050/   the model as ``save_pretrained`` writes it, plus
    optimizer.safetensors        AdamW's moments
    run.json                     step, config, the optimizer's other settings
    manifest.json                size and SHA-256 of every file; written last

Weights and moments are stored whole even if they were sharded, so a run can be resumed with any number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quietstar.checkpoints import native
from quietstar.checkpoints.contents import every, folder, is_folder, read_file
from quietstar.files.reading import check_names, check_saved, read_json, sha256
from quietstar.model import QuietStar
from quietstar.run.optimizers import check_tensors, fits, from_tensors, to_tensors
from quietstar.run.sharding import gather, shard_like, whole_weights

OPTIMIZER, RUN, MANIFEST = "optimizer.safetensors", "run.json", "manifest.json"
_LEFTOVER = re.compile(r"\.step-[0-9]{6,}(-old)?")  # what saves leave when they are killed


Size = Annotated[int, msgspec.Meta(ge=0)]  # bytes


class SavedConfig(msgspec.Struct):
    """The configs in run.json, by the names of their fields."""

    train: dict[str, Any]
    thoughts: dict[str, Any]


class Run(msgspec.Struct):
    """run.json"""

    step: Annotated[int, msgspec.Meta(ge=0)]
    config: SavedConfig
    optimizer: list[dict[str, Any]] = []


def save(
    out: str | os.PathLike,
    step: int,
    qs: QuietStar,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    keep: int,
    write: bool = True,
) -> Path:
    """Write the checkpoint after ``step`` steps. Then remove all but the newest ``keep`` up to it.

    Checkpoints of later steps are removed too: they belong to a run that this one replaces. All processes must call this, since
    shards are gathered here, on the CPU of the one that is to ``write``.
    """
    target = folder(out, step)
    with whole_weights(qs, write):
        state = optimizer.state_dict()
        moments = {name: gather(value, write).contiguous() for name, value in to_tensors(state["state"]).items()}
        if write:
            _write_whole(target, qs, moments, {"step": step, "config": config, "optimizer": state["param_groups"]})
    if write:
        for later in every(out)[::-1]:
            if later == target:
                break
            _remove(later)
        remove_old(target, keep)
    return target


def remove_old(newest: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run up to one of them, and what saves that were killed have left."""
    _remove_leftovers(newest.parent)
    paths = every(newest.parent.parent)
    for old in paths[: max(0, paths.index(newest) + 1 - keep)]:
        _remove(old)


def _write_whole(target: Path, qs: QuietStar, moments: dict[str, Tensor], run: dict[str, Any]) -> None:
    beside = target.with_name(f".{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    try:
        _write(beside, qs, moments, run)
        if is_folder(target):
            _remove(target)
        os.replace(beside, target)
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(f"{target}: {error}") from error
    finally:
        _remove_leftovers(target.parent)


def _write(beside: Path, qs: QuietStar, moments: dict[str, Tensor], run: dict[str, Any]) -> None:
    beside.mkdir()
    hashes = native.write(qs.contents(), beside)
    save_file(moments, beside / OPTIMIZER)
    (beside / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    files = {file.name: [file.stat().st_size, hashes.get(file.name) or sha256(file)] for file in sorted(beside.iterdir())}
    (beside / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    for file in beside.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    """Rename, then remove: if this is killed halfway, no half checkpoint must be left under its name."""
    old = path.with_name(f".{path.name}-old")
    os.replace(path, old)
    shutil.rmtree(old)


def _remove_leftovers(checkpoints: Path) -> None:
    """Remove what saves that were killed or failed have left."""
    for path in checkpoints.iterdir():
        if _LEFTOVER.fullmatch(path.name) and is_folder(path):
            shutil.rmtree(path, ignore_errors=True)


def check(path: Path) -> None:
    """Raises ValueError, naming the first file that is missing or not as it was written."""
    try:
        files = read_json(path / MANIFEST, dict[str, tuple[Size, str]])
    except ValueError as error:
        raise ValueError(f"{path}: {MANIFEST} is missing or damaged: {error}") from error
    check_names(f"{path}: {MANIFEST}", files)
    sizes, hashes = ({name: saved[i] for name, saved in files.items()} for i in (0, 1))
    check_saved(path, lambda name: str(path / name) if os.path.lexists(path / name) else None, sizes, hashes)


def newest_whole(out: str | os.PathLike, on_damaged: Callable[[ValueError], Any] = lambda error: None) -> Path | None:
    """The run's newest checkpoint that is not damaged, None if there is none."""
    for path in reversed(every(out)):
        try:
            check(path)
        except ValueError as error:
            on_damaged(error)
        else:
            return path
    return None


def read_run(path: Path) -> Run:
    """The run.json of a checkpoint. Raises ValueError if it is missing or damaged."""
    return read_json(path / RUN, Run)


def load(path: Path, qs: QuietStar) -> int:
    """Load the model, before it is sharded, from a checkpoint that passed ``check``; returns the number of finished steps."""
    try:
        native.restore_all(qs.contents(), path, verify=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: it is from another model: {str(error).splitlines()[0]}") from error
    return read_run(path).step


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state. Its weights may be sharded. Raises ValueError if it belongs to other weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    groups = read_run(path).optimizer
    if not fits(groups, optimizer.state_dict()["param_groups"]):
        raise ValueError(f"{path}: {RUN} has the settings of another optimizer")
    tensors = read_file(path, OPTIMIZER)
    check_tensors(f"{path}: {OPTIMIZER}", tensors, weights)
    sharded = {key: shard_like(value, weights[int(key.partition(".")[0])]) for key, value in tensors.items()}
    optimizer.load_state_dict({"state": from_tensors(sharded), "param_groups": groups})
