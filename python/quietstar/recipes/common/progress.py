"""Where a recipe's run stands, on disk, so that an interrupted one goes on with the numbers of the unbroken one.

<out>/progress/       weights.safetensors, optimizer.safetensors and state.json; written beside and renamed
<out>/metrics.jsonl   a line an update
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from quietstar.files import replaced
from quietstar.recipes.common.log import LoggedMetrics
from quietstar.run.metrics import check_kind
from quietstar.run.signals import Interrupted, Signals

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FREE = ("out", "save_every")  # settings that no number of a run depends on


class Progress:
    """A run's folder.

    Args:
        settings: what the run's numbers depend on, JSON values by name.
        state: how a new run begins, JSON values by name; "step", the updates that are done, is one. Recipes change it.
        resume: go on with a run that is there.

    Attributes:
        begun: whether a run is there, which ``load`` then loads.

    Raises:
        ValueError: a run is there and ``resume`` is False, or it has other settings or is of another command, or its state is
            damaged.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], state: dict[str, Any], resume: bool):
        check_kind(out, "progress")
        self.folder, self.state = Path(out) / "progress", state
        self.settings = json.loads(json.dumps(settings))
        self.begun = self.folder.is_dir()
        if self.begun and not resume:
            raise ValueError(f"{out}: a run is there already; resume goes on with it, another out starts anew")
        if self.begun:
            self.state = self._read()
        self.metrics = LoggedMetrics(Path(out) / "metrics.jsonl", self.state["step"])

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the saved weights, and the optimizer's moments where one was saved, into these.

        Raises:
            ValueError: files that are damaged or of another model.
        """
        try:
            load_model(module, self.folder / WEIGHTS)
            tensors = load_file(self.folder / OPTIMIZER)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{self.folder}: damaged or of another model: {str(error).splitlines()[0]}") from error
        if optimizer is not None and tensors:
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                place, name = key.split(".", 1)
                moments.setdefault(int(place), {})[name] = value
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write state, weights and moments, all of them or none."""
        moments = optimizer.state_dict()["state"] if optimizer is not None else {}
        tensors = {f"{i}.{name}": x.cpu().contiguous() for i, values in moments.items() for name, x in values.items()}
        try:
            with replaced(self.folder) as beside:
                save_model(module, str(beside / WEIGHTS))
                save_file(tensors, beside / OPTIMIZER)
                content = {"settings": self.settings, "state": self.state}
                (beside / STATE).write_text(json.dumps(content, indent=2) + "\n")
        except SafetensorError as error:  # what safetensors calls a full disk
            raise OSError(f"{self.folder}: {error}") from error

    def save_if(self, signals: Signals, every: int, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Save after each ``every`` updates, and after a signal, which then ends the run. Raises Interrupted."""
        if signals.caught or self.state["step"] % every == 0:
            self.save(module, optimizer)
        if signals.caught:
            raise Interrupted(self.state["step"], self.folder)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / STATE).read_text())
            saved, state = content["settings"], content["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: {STATE} is missing or damaged: {error}") from error
        for name, value in self.settings.items():
            if name not in FREE and saved.get(name) != value:
                raise ValueError(f"{self.folder}: the run there has {name}={saved.get(name)!r}, not {value!r}")
        return state
