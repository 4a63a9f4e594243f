"""What a recipe's run leaves on disk, and how a stopped run continues from it with the same numbers.

Everything is a folder that is written whole or not at all: an ordinary checkpoint with its figures (``save_model``), or the
state between two updates (``Progress``). A run that trains in one go has the second, one in rounds (``Rounds``) the first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import nn
from transformers import PreTrainedModel

from quietstar.checkpoints import places, pretrained
from quietstar.files.reading import json_lines, read_json, reason_of, sha256
from quietstar.files.writing import put_back, replaced, write_whole
from quietstar.run.lock import LOCK
from quietstar.run.metrics import Line
from quietstar.run.optimizers import check_tensors, from_tensors, to_tensors
from quietstar.run.resume import Settings, check_folder
from quietstar_recipes.common.log import LOG, LoggedMetrics, log_figures
from quietstar_recipes.tasks import Task

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FOLDERS = ("progress", "model", "two-turns", "first-stage", "stages", "teacher", "pair", "verifier", "plain", "direct")
SETTINGS, REPORT, BEST = "recipe.json", "report.json", "best"
Rows = Sequence[Mapping[str, Any]]


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write a .jsonl file."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def save_model(folder: Path, model: PreTrainedModel, task: Task, report: Mapping[str, Any], **rows: Rows) -> None:
    """Write an ordinary checkpoint with a report, rows and a manifest of them, all of it or nothing."""
    with replaced(folder) as beside:
        pretrained.save_model(model, task.tokenizer, beside)
        write_json(beside / REPORT, report)
        for name, several in rows.items():
            write_lines(beside / f"{name}.jsonl", several)
        places.seal(beside)


def check_whole(folder: Path) -> None:
    """Raises ValueError, naming the file, if one is not as it was saved. Runs of older versions have no manifest."""
    if os.path.lexists(folder / places.MANIFEST):
        places.check(folder)


def load_model(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """A checkpoint, on the device and in the dtype of ``like``. Raises ValueError if it is missing or damaged."""
    check_whole(folder)
    return cast(Any, pretrained.load_model(folder, dtype=like.dtype)).to(like.device)


def check_free(out: Path) -> None:
    """Raises ValueError where something else than a folder has the name of one that a recipe saves in ``out``."""
    for path in [out / name for name in FOLDERS] + sorted(path for path in out.glob("round-*") if path.name[6:].isdigit()):
        places.check_folder_or_free(path)


class Saved(msgspec.Struct):
    """state.json"""

    settings: dict[str, Any]
    state: dict[str, Any]


class Progress:
    """A run between two of its updates: weights, moments and state in ``out``/progress, figures in ``out``/metrics.jsonl.

    Args:
        settings: what a run must have in common with its continuation.
        state: the state of a new run, JSON values by name, which the recipe changes; "step" is the number of finished updates.
        resume: whether to continue a run that is in ``out``; ``begun`` says whether there is one, which ``load`` loads.
        kind: what every line of its metrics must have.

    Raises:
        ValueError: a run that was not to be resumed, has other settings, belongs to another command or is damaged.
    """

    def __init__(self, out: str | Path, settings: Settings, state: dict[str, Any], resume: bool, kind: type[Line] = Line):
        self.folder, self.settings, self.state = Path(out) / "progress", settings, state
        check_free(Path(out))
        put_back(self.folder)
        self.begun = self.folder.is_dir()
        check_folder(out, "progress", self.begun, resume)
        if self.begun:
            saved = read_json(self.folder / STATE, Saved)
            check_whole(self.folder)
            self.state = state | saved.state
            settings.check(self.folder, saved.settings)
        self.metrics = LoggedMetrics(Path(out) / "metrics.jsonl", self.state["step"], kind)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load weights and moments, if there is a saved run. Raises ValueError if they are damaged or of another model."""
        if not self.begun:
            return
        try:
            load_weights(module, self.folder / WEIGHTS)
            tensors = load_file(self.folder / OPTIMIZER)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{self.folder}: damaged or from another model: {reason_of(error)}") from error
        if optimizer is not None:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            check_tensors(f"{self.folder}: {OPTIMIZER}", tensors, weights)
            optimizer.load_state_dict(optimizer.state_dict() | {"state": from_tensors(tensors)})

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save state, weights and moments, all of them or none."""
        moments = to_tensors(optimizer.state_dict()["state"])
        with replaced(self.folder) as beside:
            save_weights(module, str(beside / WEIGHTS))
            save_file({name: x.cpu().contiguous() for name, x in moments.items()}, beside / OPTIMIZER)
            write_json(beside / STATE, {"settings": self.settings.values, "state": self.state})
            places.seal(beside)


class Rounds:
    """A run in rounds: ``round-00`` has the initial model, ``round-01`` and so on the model after each round.

    A round's folder is an ordinary checkpoint with the round's figures in report.json and its rows in .jsonl files. The link
    ``best`` leads to the best round so far. Arguments and errors are those of ``Progress``.
    """

    def __init__(self, out: str | Path, settings: Settings, resume: bool):
        self.out = Path(out)
        check_free(self.out)
        path = self.out / SETTINGS
        # Settings alone are from a run that failed at once.
        begun = path.exists() and any(file.name not in (SETTINGS, LOCK) for file in self.out.iterdir())
        check_folder(out, SETTINGS, begun, resume)
        if begun:
            settings.check(self.out, read_json(path, dict[str, Any]))
            for number in range(self.done + 1):
                check_whole(self.folder(number))
            self.reports()
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings.values)

    @property
    def done(self) -> int:
        """Finished rounds; 0 if there is only the initial model, -1 if there is nothing."""
        return next(number for number in count() if not self.folder(number).is_dir()) - 1

    def folder(self, number: int) -> Path:
        return self.out / f"round-{number:02d}"

    def report(self, number: int) -> dict[str, Any]:
        path = self.folder(number) / REPORT
        report = read_json(path, dict[str, Any])
        if (found := report.get("round")) != number:
            raise ValueError(f"{path}: it is of round {found}: move this folder, where round {number} belongs")
        return report

    def reports(self) -> list[dict[str, Any]]:
        """The figures of the initial model and of all rounds."""
        return [self.report(number) for number in range(self.done + 1)]

    def rows(self, number: int, name: str, kind: Any = dict[str, Any]) -> list[Any]:
        """The rows of a round's file, each of the type ``kind``."""
        return [row for _, row in json_lines(self.folder(number) / f"{name}.jsonl", kind)]

    def log(self, recipe: str, number: int) -> Callable[[dict[str, Any]], None]:
        """A function that logs the figures of a training step of a round. Steps are counted over all rounds."""
        done = sum(report.get("steps", 0) for report in self.reports())
        metrics = LoggedMetrics(self.out / "metrics.jsonl", done)
        return lambda line: metrics.add({"recipe": recipe, "round": number, **line, "step": done + line["step"]})

    def save(self, number: int, model: PreTrainedModel, task: Task, report: Mapping[str, Any], **rows: Rows) -> None:
        save_model(self.folder(number), model, task, report, **rows)
        log_figures(self.out, report)
        link(self.out / BEST, self.folder(best_round(self.reports())).name)


def best_round(reports: Sequence[Mapping[str, Any]]) -> int:
    """The last of the rounds with the highest accuracy on validation problems; 0 is the start.

    Chosen by its test problems, the accuracy of the best round would be too high: the best of several is also the luckiest.
    """
    known = [(-1.0 if (x := report.get("valid_accuracy")) is None else x, i) for i, report in enumerate(reports)]
    return max(known)[1]


def link(path: Path, target: str) -> None:
    """Let the link ``path`` lead to ``target``, which is beside it, in one step. Where that can't be, a line says so."""
    if path.exists() and not path.is_symlink():
        LOG.info("%s: not linking to %s: it exists and is not ours", path, target)
        return
    new = path.with_name(f".{path.name}")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(target, target_is_directory=True)
        os.replace(new, path)
    except OSError as error:
        LOG.info("%s: no link to %s: %s", path, target, error.strerror)


def hashes(task: Task, model: PreTrainedModel | None = None, name: str = "") -> dict[str, str]:
    """What ``Settings`` compares of a run's inputs: the files of its task, and the model that it starts from."""
    found = {f"the file {path}": sha256(path) for path in task.files}
    return found if model is None else found | {f"the model {name}".rstrip(): fingerprint(model)}


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the weights, to tell whether two runs began with the same model."""
    digest = hashlib.blake2b(digest_size=8)
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
