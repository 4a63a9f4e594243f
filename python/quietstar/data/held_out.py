"""What a model was trained on, and what its runs held out: a description saved with the model, and a check against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quietstar.checkpoints.contents import TrainedOn
from quietstar.data.sources import STDIN, absolute, names
from quietstar.data.texts import Data, DataConfig, Text, in_blocks, read_texts, texts_hash, whole_texts
from quietstar_kernels.checks import instance, refusal


def describe(config: DataConfig, data: Data, base: str) -> TrainedOn:
    """The description of a run on ``data``. Code of your own that trains a model adds it to ``QuietStar.trained_on``.

    Args:
        base: the model that the run begins with, a folder or a hub name.
    """
    instance("describe: data", data, Data)
    if not isinstance(base, str):
        raise refusal("describe: base", "a name", base)
    fields = _fields(instance("describe: config", config, DataConfig))
    return TrainedOn(base, fields, data.texts, data.sha256, len(data.held_out))


def data_config(run: TrainedOn) -> DataConfig:
    """The data of a run. Raises ValueError for a description that is not of this version."""
    known = {field.name for field in dataclasses.fields(DataConfig)}
    if unknown := run.data.keys() - known:
        raise ValueError(f"trained_on: DataConfig: unknown field {', '.join(sorted(unknown))}")
    return DataConfig(**run.data)


def differences(run: TrainedOn, config: DataConfig) -> list[str]:
    """How the data differs from a run's, such as "length 256 instead of 48"."""
    own = _fields(config).items()
    return [f"{name} {value} instead of {run.data[name]}" for name, value in own if run.data.get(name, value) != value]


def check_held_out(trained_on: Sequence[TrainedOn], config: DataConfig, data: Data) -> list[str]:
    """Check that a model was not trained on the held-out texts of ``data``.

    Args:
        trained_on: the model's; see ``QuietStar``.
        config: what ``data`` was loaded with.

    Returns:
        Sentences on what could not be checked.
    """
    unknown = []
    for run in trained_on:
        same = data.sha256 == run.sha256
        if same and not differences(run, replace(config, data=run.data["data"])):
            continue
        try:
            if not same and STDIN in names(run.data["data"]):
                raise ValueError("they came from standard input")
            texts = read_texts(config if same else replace(data_config(run), chat=config.chat))  # else no two would be equal
        except ValueError as error:
            unknown.append(f"the texts of an earlier run can't be read, so they were not compared: {error}")
            continue
        whole = same or texts_hash(texts) == run.sha256
        learned = set(_trained(run, texts) if whole else texts)
        seen = sum(text in learned for text in data.held_out_texts)
        if seen:
            why = "; ".join(differences(run, config)) or f"{config.data} has changed since"
            raise ValueError(
                f"{seen} of the {len(data.held_out)} texts held out here are among those that the model was trained on ({why})"
            )
    return unknown


def _fields(config: DataConfig) -> dict[str, Any]:
    """By name; a file by its whole path."""
    return dataclasses.asdict(config) | {"data": absolute(config.data)}


def _trained(run: TrainedOn, texts: list[Text]) -> list[Text]:
    """Those of a run's texts that it was trained on, if only in part."""
    config = data_config(run)
    if config.held_out_split or in_blocks(config, len(texts)):
        return texts
    held = set(whole_texts(len(texts), config.held_out, config.held_out_seed))
    return [text for i, text in enumerate(texts) if i not in held]
