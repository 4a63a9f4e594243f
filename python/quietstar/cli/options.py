"""From typed options and config files to the config classes, whose fields hold the help texts."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec

from quietstar.config import PRESETS


class UsageError(Exception):
    """An option or a config file that can't be used."""


def parse(commands: Mapping[str, type], arguments: list[str]) -> Any:
    """One of the commands, made from what was typed. Exits after --help and, with code 2, where tyro can't read an option.

    Raises:
        UsageError: a value outside its range, or a config file that can't be read.
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_struct_rule)
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog="quietstar",
        description="Quiet-STaR: language models that think before every token.",
        args=_expand(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """Options by name from a json or yaml file."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a config file: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a config file holds options by name, got {type(values).__name__}")
    return values


def _expand(arguments: list[str]) -> list[str]:
    """Put a config file's options before the typed ones, which win, and auto behind a --resume alone."""
    expanded: list[str] = []
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        expanded.append(argument)
        if argument == "--resume" and following.startswith("--"):
            expanded.append("auto")
        name, _, value = argument.partition("=")
        if name == "--config":
            expanded[1:1] = _as_typed(read_config(value or following))
    return expanded


def _as_typed(values: dict[str, Any]) -> list[str]:
    """What the preset fills is left to it, so that another preset can be typed."""
    filled = PRESETS.get(values.get("preset", "official"), {})
    typed = []
    for name, value in values.items():
        option = str(name).replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{option}" if value else f"--no-{option}")
        elif name not in filled or value != filled[name]:
            typed.append(f"--{option}={value}")
    return typed


def _has_help(config: Any) -> bool:
    return dataclasses.is_dataclass(config) and all("help" in field.metadata for field in dataclasses.fields(config))


def _struct_rule(info: Any) -> StructConstructorSpec | None:
    """Options from the fields of our config classes and their help texts."""
    config = info.type
    if not _has_help(config):
        return None

    def make(**values: Any) -> Any:
        try:
            return config(**values)
        except ValueError as error:
            raise UsageError(str(error)) from error

    hints = typing.get_type_hints(config)
    options = [
        StructFieldSpec(
            name=field.name,
            type=hints[field.name] | None if field.default is None else hints[field.name],
            default=field.default,
            helptext=field.metadata["help"],
        )
        for field in dataclasses.fields(config)
    ]
    return StructConstructorSpec(instantiate=make, fields=tuple(options))
