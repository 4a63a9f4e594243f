"""A recipe's run in rounds: each ends in a folder that is written whole, so that a stopped run goes on behind the last one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from quietstar.data.texts import json_lines
from quietstar.files import replaced, write_whole
from quietstar.recipes.common.log import LoggedMetrics, log_figures
from quietstar.recipes.tasks import Task
from quietstar.run.metrics import check_kind

SETTINGS, REPORT = "recipe.json", "report.json"
Rows = Sequence[Mapping[str, Any]]


class Rounds:
    """``out/round-00`` is the model the run began with, ``round-01`` and so on what came after each round.

    A round's folder is an ordinary checkpoint with report.json, the round's figures, and the round's rows as .jsonl files.

    Args:
        settings: what the run's numbers depend on.
        resume: go on with a run that is there.

    Raises:
        ValueError: a run is there and ``resume`` is False, or it has other settings or is of another command.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], resume: bool):
        self.out = Path(out)
        check_kind(out, SETTINGS)
        path = self.out / SETTINGS
        now = json.loads(json.dumps(settings))
        if path.exists() and len(list(self.out.iterdir())) > 1:  # the settings alone are of a run that failed at once
            if not resume:
                raise ValueError(f"{self.out}: a run is there already; resume goes on with it, another out starts anew")
            saved = read_json(path)
            for name in {**saved, **now}:
                if saved.get(name) != now.get(name):
                    raise ValueError(f"{self.out}: the run there has {name}={saved.get(name)!r}, not {now.get(name)!r}")
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(now, indent=2) + "\n")

    @property
    def done(self) -> int:
        """Rounds that are whole; 0 with the start alone, -1 with nothing."""
        return len(list(self.out.glob("round-*"))) - 1

    def folder(self, number: int) -> Path:
        return self.out / f"round-{number:02d}"

    def report(self, number: int) -> dict[str, Any]:
        return read_json(self.folder(number) / REPORT)

    def reports(self) -> list[dict[str, Any]]:
        """Of the start and all rounds."""
        return [self.report(number) for number in range(self.done + 1)]

    def rows(self, number: int, name: str) -> list[dict[str, Any]]:
        return [row for _, row in json_lines(self.folder(number) / f"{name}.jsonl")]

    def model(self, number: int, like: PreTrainedModel) -> PreTrainedModel:
        """The model of a round, where and in the type that ``like`` is."""
        return load_model(self.folder(number), like)

    def log(self, recipe: str, number: int) -> Callable[[dict[str, Any]], None]:
        """Takes the figures of a round's training steps; metrics.jsonl counts steps over all rounds."""
        done = sum(report.get("steps", 0) for report in self.reports())
        metrics = LoggedMetrics(self.out / "metrics.jsonl", done)
        return lambda line: metrics.add({"recipe": recipe, "round": number, **line, "step": done + line["step"]})

    def save(self, number: int, model: PreTrainedModel, task: Task, report: Mapping[str, Any], **rows: Rows) -> None:
        save_model(self.folder(number), model, task, report, **rows)
        log_figures(self.out, report)


def read_json(path: Path) -> Any:
    """What a file of a run holds. Raises ValueError where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged: {error}") from error


def save_model(folder: Path, model: PreTrainedModel, task: Task, report: Mapping[str, Any], **rows: Rows) -> None:
    """An ordinary checkpoint with a report and rows beside it, whole or not at all."""
    with replaced(folder) as beside:
        model.save_pretrained(beside)
        task.tokenizer.save_pretrained(beside)
        (beside / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        for name, several in rows.items():
            (beside / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))


def load_model(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """A checkpoint, where and in the type that ``like`` is. Raises ValueError for one that is missing or damaged."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: no model loads from there: {str(error).strip().splitlines()[0]}") from error
    return cast(Any, model).to(like.device)


def fingerprint(model: PreTrainedModel) -> str:
    """Of the weights, to tell whether two models come from the same one."""
    digest = hashlib.blake2b(digest_size=8)
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
