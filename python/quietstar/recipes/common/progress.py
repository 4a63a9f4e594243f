"""The state of a recipe's run on disk. A resumed run gives the same numbers as an uninterrupted one.

<out>/progress/       weights.safetensors, optimizer.safetensors and state.json; written to a temporary folder, then renamed
<out>/metrics.jsonl   one line per update
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from quietstar.files.reading import as_type, read_json
from quietstar.files.writing import put_back, replaced
from quietstar.recipes.common.log import LoggedMetrics
from quietstar.run.resume import Settings, check_folder
from quietstar.run.signals import Interrupted, Signals

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
Count = Annotated[int, msgspec.Meta(ge=0)]


class State(msgspec.Struct):
    """What every recipe's state has: the number of finished updates."""

    step: Count


class Saved(msgspec.Struct):
    """state.json"""

    settings: dict[str, Any]
    state: dict[str, Any]


class Progress:
    """A run's folder.

    Args:
        settings: what a run must have in common with its continuation.
        state: the state of a new run, JSON values by name, which the recipe changes; "step" is the number of finished updates.
        resume: whether to continue a run that is in ``out``.
        kind: what a saved state must have.

    Attributes:
        begun: whether there is such a run; ``load`` then loads it.

    Raises:
        ValueError: there is a run and ``resume`` is False, it has other settings or belongs to another command, or its state is
            damaged.
    """

    def __init__(self, out: str | Path, settings: Settings, state: dict[str, Any], resume: bool, kind: type[State] = State):
        self.folder, self.settings, self.state = Path(out) / "progress", settings, state
        put_back(self.folder)
        self.begun = self.folder.is_dir()
        check_folder(out, "progress", self.begun, resume)
        if self.begun:
            self.state = state | self._read()
            as_type(kind, self.state, f"{self.folder / STATE}: state")
        self.metrics = LoggedMetrics(Path(out) / "metrics.jsonl", self.state["step"])

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load the saved weights, and the optimizer's moments if they were saved.

        Raises:
            ValueError: the files are damaged or belong to another model.
        """
        try:
            load_model(module, self.folder / WEIGHTS)
            tensors = load_file(self.folder / OPTIMIZER)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{self.folder}: damaged or from another model: {str(error).splitlines()[0]}") from error
        if optimizer is not None and tensors:
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                index, name = key.split(".", 1)
                moments.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Save state, weights and moments, all of them or none."""
        moments = optimizer.state_dict()["state"] if optimizer is not None else {}
        tensors = {f"{i}.{name}": x.cpu().contiguous() for i, values in moments.items() for name, x in values.items()}
        try:
            with replaced(self.folder) as beside:
                save_model(module, str(beside / WEIGHTS))
                save_file(tensors, beside / OPTIMIZER)
                content = {"settings": self.settings.values, "state": self.state}
                (beside / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except SafetensorError as error:  # raised when the disk is full
            raise OSError(f"{self.folder}: {error}") from error

    def save_if(self, signals: Signals, every: int, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Save every ``every`` updates, and after a signal, which ends the run by raising Interrupted."""
        if signals.caught or self.state["step"] % every == 0:
            self.save(module, optimizer)
        if signals.caught:
            raise Interrupted(self.state["step"], self.folder)

    def _read(self) -> dict[str, Any]:
        saved = read_json(self.folder / STATE, Saved)
        self.settings.check(self.folder, saved.settings)
        return saved.state
