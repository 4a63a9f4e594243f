"""Checkpoints of a run. Each is written to a temporary folder, then renamed; a manifest tells which file is damaged, if any.

<run>/checkpoints/step-000050/   the model as ``save_pretrained`` writes it, plus
    optimizer.safetensors        AdamW's moments
    run.json                     step, config, the optimizer's other settings
    manifest.json                size and SHA-256 of every file; written last

Weights and moments are stored whole even if they were sharded, so a run can be resumed with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quietstar.checkpoints import native
from quietstar.model import QuietStar
from quietstar.run.optimizers import from_tensors, to_tensors
from quietstar.run.sharding import gather, shard_like, whole_weights

OPTIMIZER, RUN, MANIFEST = "optimizer.safetensors", "run.json", "manifest.json"


def folder(out: str | os.PathLike, step: int) -> Path:
    return Path(out) / "checkpoints" / f"step-{step:06d}"


def every(out: str | os.PathLike) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name))


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

    Raises:
        OSError: the files could not be written, for example on a full disk. Older checkpoints are not affected.
    """
    target = folder(out, step)
    with whole_weights(qs, write):
        moments = _pack_optimizer(optimizer, write)
        if write:
            _write_whole(target, step, qs, moments, config)
    if write:
        paths = every(out)
        newest = paths.index(target) + 1
        for old in paths[: max(0, newest - keep)] + paths[newest:]:
            _remove(old)
    return target


# State tensors by "parameter index.name", and the settings of the parameter groups.
Moments = tuple[dict[str, Tensor], list[dict[str, Any]]]


def _write_whole(target: Path, step: int, qs: QuietStar, moments: Moments, config: dict[str, Any]) -> None:
    beside = target.with_name(f".{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    try:
        _write(beside, step, qs, moments, config)
        if target.exists():
            _remove(target)
        os.replace(beside, target)
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(f"{target}: {error}") from error
    finally:
        _remove_leftovers(target.parent)


def _write(beside: Path, step: int, qs: QuietStar, moments: Moments, config: dict[str, Any]) -> None:
    qs.save_pretrained(beside)
    tensors, settings = moments
    save_file(tensors, beside / OPTIMIZER)
    run = {"step": step, "config": config, "optimizer": settings}
    (beside / RUN).write_text(json.dumps(run, indent=2) + "\n")
    files = {file.name: _fingerprint(file) for file in sorted(beside.iterdir())}
    (beside / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
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
    for leftover in checkpoints.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def check(path: Path) -> None:
    """Raises ValueError, naming the first file that is missing or not as it was written."""
    try:
        files = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {MANIFEST} is missing or damaged: {error}") from error
    for name, fingerprint in files.items():
        file = path / name
        if not file.exists():
            raise ValueError(f"{path}: {name} is missing")
        if _fingerprint(file) != fingerprint:
            raise ValueError(f"{path}: {name} is damaged: it is not the file that was saved")


def newest_whole(out: str | os.PathLike, on_damaged: Callable[[ValueError], Any] = lambda error: None) -> Path | None:
    """The run's newest checkpoint that is not damaged, None if there is none.

    Args:
        on_damaged: called with the error of each newer checkpoint, which is passed over.
    """
    for path in reversed(every(out)):
        try:
            check(path)
        except ValueError as error:
            on_damaged(error)
        else:
            return path
    return None


def load(path: Path, qs: QuietStar) -> int:
    """Load the model, before it is sharded; returns the number of finished steps.

    Raises:
        ValueError: the checkpoint is damaged or from another model.
    """
    check(path)
    try:
        native.restore_all(qs.contents(), path)
    except RuntimeError as error:
        raise ValueError(f"{path}: it is from another model: {str(error).splitlines()[0]}") from error
    return int(json.loads((path / RUN).read_text())["step"])


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state. Its weights may be sharded."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    tensors = {
        key: shard_like(value, weights[int(key.partition(".")[0])])
        for key, value in load_file(path / OPTIMIZER).items()
        if not key.startswith("random.")  # in older checkpoints, from before dropout was a function of (seed, step)
    }
    groups = json.loads((path / RUN).read_text())["optimizer"]
    optimizer.load_state_dict({"state": from_tensors(tensors), "param_groups": groups})


def _pack_optimizer(optimizer: torch.optim.Optimizer, write: bool) -> Moments:
    state = optimizer.state_dict()
    tensors = {name: gather(value, write).contiguous() for name, value in to_tensors(state["state"]).items()}
    return tensors, state["param_groups"]


def _fingerprint(file: Path) -> list:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return [file.stat().st_size, digest.hexdigest()]
