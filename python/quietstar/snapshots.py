"""Checkpoints of a run: folders written beside and renamed, with a manifest that names every damaged file.

<run>/checkpoints/step-000050/   the model as ``save_pretrained`` writes it, plus
    optimizer.safetensors        AdamW's moments and the random states
    run.json                     step, config, the optimizer's other settings
    manifest.json                size and SHA-256 of every file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quietstar import checkpoint
from quietstar.model import QuietStar

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
) -> Path:
    """Write the checkpoint after ``step`` steps, then drop all but the newest ``keep`` and those of later steps, which
    belong to a run that this one replaces. Raises OSError with no room left.
    """
    target = folder(out, step)
    beside = target.with_name(f".{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_rests(target.parent)
    try:
        _write(beside, step, qs, optimizer, config)
        if target.exists():
            _remove(target)
        os.replace(beside, target)
    except SafetensorError as error:  # what safetensors calls a full disk
        raise OSError(f"{target}: {error}") from error
    finally:
        _remove_rests(target.parent)
    paths = every(out)
    newest = paths.index(target) + 1
    for old in paths[: max(0, newest - keep)] + paths[newest:]:
        _remove(old)
    return target


def _write(beside: Path, step: int, qs: QuietStar, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
    qs.save_pretrained(beside)
    tensors, settings = _pack_optimizer(optimizer)
    tensors["random.cpu"] = torch.get_rng_state()
    for i, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"random.cuda.{i}"] = state
    save_file(tensors, beside / OPTIMIZER)
    run = {"step": step, "config": config, "optimizer": settings}
    (beside / RUN).write_text(json.dumps(run, indent=2) + "\n")
    files = {file.name: _fingerprint(file) for file in sorted(beside.iterdir())}
    (beside / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
    for file in beside.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    """Renamed first: killed in the middle, this must not leave half a checkpoint under its name."""
    rest = path.with_name(f".{path.name}-old")
    os.replace(path, rest)
    shutil.rmtree(rest)


def _remove_rests(checkpoints: Path) -> None:
    """What a save that was killed or failed left behind."""
    for rest in checkpoints.glob(".*"):
        shutil.rmtree(rest, ignore_errors=True)


def check(path: Path) -> None:
    """Raises ValueError that names the first file which is not as it was written."""
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


def load(path: Path, qs: QuietStar, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put model, optimizer and random states back; returns ``run.json``. Raises ValueError for a damaged checkpoint."""
    check(path)
    run = json.loads((path / RUN).read_text())
    try:
        checkpoint.restore_all(qs, path)
    except RuntimeError as error:
        raise ValueError(f"{path}: it is of another model: {str(error).splitlines()[0]}") from error
    tensors = load_file(path / OPTIMIZER)
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = [tensors.pop(name) for name in sorted(tensors) if name.startswith("random.cuda.")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    _unpack_optimizer(optimizer, tensors, run["optimizer"])
    return run


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State tensors by "parameter index.name", and the groups' settings."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def _unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _fingerprint(file: Path) -> list:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return [file.stat().st_size, digest.hexdigest()]
