"""A run's checkpoints: the model as ``save_pretrained`` writes it, plus

optimizer.safetensors   AdamW's moments
run.json                step, config, the optimizer's other settings
manifest.json           size and SHA-256 of every file; written last

Weights and moments are stored whole even if they were sharded, so a run can be resumed with any number of processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.optim import Optimizer

from quietstar.checkpoints import native, places
from quietstar.checkpoints.places import RUN
from quietstar.files.reading import read_json, reason_of
from quietstar.model import QuietStar
from quietstar.run.optimizers import OPTIMIZER, to_tensors
from quietstar.run.resume import RunFile
from quietstar.run.sharding import gather, whole_weights


def save(
    out: str | Path, step: int, qs: QuietStar, optimizer: Optimizer, config: dict[str, Any], keep: int, write: bool = True
) -> Path:
    """Write the checkpoint after ``step`` steps, which is returned. Then remove all but the newest ``keep`` up to it.

    Checkpoints of later steps are removed too: they belong to a run that this one replaces. All processes must call this, since
    shards are gathered here, on the CPU of the one that is to ``write``.
    """
    with whole_weights(qs, write):
        state = optimizer.state_dict()
        moments = {name: gather(value, write).contiguous() for name, value in to_tensors(state["state"]).items()}
        path = places.folder(out, step)
        if not write:
            return path
        with places.new(path) as beside:
            hashes = native.write(qs.contents(), beside)
            save_file(moments, beside / OPTIMIZER)
            run = {"step": step, "config": config, "optimizer": state["param_groups"]}
            (beside / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
            places.seal(beside, hashes)
    places.remove_others(path, keep, later=True)
    return path


def load(path: Path, qs: QuietStar) -> int:
    """Load the model, before it is sharded, from a checkpoint that is whole; returns the number of finished steps."""
    try:
        native.restore_all(qs.contents(), path, verify=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: it is from another model: {reason_of(error)}") from error
    return read_json(path / RUN, RunFile).step
