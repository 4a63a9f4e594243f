"""What a command takes over from the checkpoint of its --model, where nothing else is typed: its data, and how it thinks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from quietstar.checkpoints import native
from quietstar.data.held_out import data_config

# Names of the options that each command takes over; None stands for all of that kind.
DATA: dict[str, Any] = {"train": None, "eval": None, "export": None, "fast": None, "doctor": ("length",)}
THOUGHTS: dict[str, Any] = {"train": None, "doctor": ("thoughts", "thought_tokens", "lookahead")}
# How a run reads its data, not what it reads: another file has fields and splits of its own.
OF_SOURCE = ("data", "text_field", "split", "hub_texts", "held_out_split")


def inherited(command: str, model: str) -> dict[str, Any]:
    """Options by name from the description of the checkpoint ``model``; none where it has none.

    Raises:
        ValueError: the description is damaged, or there is no such model.
    """
    if not model or model.startswith("-") or command not in {**DATA, **THOUGHTS}:
        return {}
    description = native.read_description(model)
    if description is None:
        return {}
    thoughts, runs = description
    data = asdict(data_config(runs[-1])) if runs else {}
    return _chosen(THOUGHTS, command, thoughts.to_dict()) | _chosen(DATA, command, data)


def for_source(values: dict[str, Any], data: str) -> dict[str, Any]:
    """The options that make sense for ``data``: not those of another source."""
    if not data or data == values.get("data") or _same_file(data, values.get("data")):
        return values
    return {name: value for name, value in values.items() if name not in OF_SOURCE}


def report_changes(model: str, values: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Print what is not as in the checkpoint; in the first of several processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    changed = [
        f"{name.replace('_', '-')} {used[name]} instead of {value}"
        for name, value in values.items()
        if name in used and used[name] != value and not (name == "data" and _same_file(used[name], value))
    ]
    if changed:
        print(f"not as in {model}: {', '.join(changed)}")


def _chosen(names: Mapping[str, Any], command: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if command not in names:
        return {}
    wanted = names[command]
    return {name: value for name, value in values.items() if wanted is None or name in wanted}


def _same_file(one: Any, other: Any) -> bool:
    return isinstance(one, str) and isinstance(other, str) and os.path.exists(one) and os.path.realpath(one) == other
