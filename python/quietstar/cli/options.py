"""From what was typed, and config files, to a command with its options."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec

from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import check_ignored
from quietstar.cli.inherit import for_source, inherited, report_changes
from quietstar.config import OLD_NAMES, PRESETS, TRAIN_PRESETS, renamed
from quietstar.files.reading import read_yaml

# Options of a command that are now another command.
MOVED = {
    ("eval", "questions"): "quietstar ask --questions",
    ("think", "export"): "quietstar export --out",
    ("think", "data"): "quietstar export --data",
}

LARGEST = 1e30
LONGEST, LONG = 4096, ("prompt", "answer_prefix")  # characters of an option with its value; options that may be longer


def parse(commands: Mapping[str, type], arguments: list[str]) -> Any:
    """One of the commands, made from what was typed. Exits after --help and, with code 2, where tyro can't read an option.

    Raises:
        UsageError: a value outside its range, an option that would be ignored or has another name now, or a config file
            that can't be read.
    """
    typed = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    _check_moved(arguments[0] if arguments else "", typed)
    _check_texts(arguments)
    arguments, from_model = _expand(arguments)
    registry = ConstructorRegistry()
    registry.struct_rule(_struct_rule)
    registry.primitive_rule(_number_rule)
    command = tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog="quietstar",
        description="Quiet-STaR: language models that think before every token. --version, alone, prints versions.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )
    name = next(name for name, kind in commands.items() if isinstance(command, kind))
    check_ignored(name, _flat(command), typed)
    report_changes(getattr(command, "model", ""), from_model, _flat(command))
    return command


def read_config(path: str | Path) -> dict[str, Any]:
    """Options by name from a JSON or YAML file."""
    try:
        values = read_yaml(path, dict[str, bool | int | float | str | None])
    except ValueError as error:
        raise UsageError(f"{error}; a config file must map options to values") from error
    return renamed(values)


def _check_moved(command: str, typed: set[str]) -> None:
    for name in sorted(typed):
        option = f"--{name.replace('_', '-')}"
        if (command, name) in MOVED:
            raise UsageError(f"quietstar {command} no longer takes {option}: use {MOVED[command, name]}")
        if name in OLD_NAMES:
            raise UsageError(f"{option} is now --{OLD_NAMES[name].replace('_', '-')}")


def _check_texts(arguments: list[str]) -> None:
    """Refuse what no tokenizer or file takes, and options so long that it would take minutes to find similar ones."""
    for argument in arguments:
        name = argument[2:].partition("=")[0].replace("-", "_")
        try:
            argument.encode()
        except UnicodeEncodeError as error:  # bytes that are not in the locale's encoding
            raise UsageError(
                f"{argument[:60]!a} is not UTF-8, or the locale is not: rename the file, or set LC_ALL=C.UTF-8"
            ) from error
        if "\0" in argument:
            raise UsageError(f"{argument[:60]!a} has a zero byte")
        if argument.startswith("-") and len(argument) > LONGEST and name not in LONG:
            raise UsageError(f"{argument[:60]!a}... is too long: {LONGEST:,} characters are the most of an option")


def _flat(command: Any) -> dict[str, Any]:
    """All options of a command by name, with those of its config classes."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        values |= vars(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def _expand(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Put options before the typed ones, which win: those of a config file, before these a preset's, and first what is taken
    over from the model, which is returned too. And auto after --resume alone."""
    expanded: list[str] = []
    given: dict[str, Any] = {}  # what is typed or in a config file
    from_file: list[str] = []
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        expanded.append(argument)
        if argument == "--resume" and following.startswith("--"):
            expanded.append("auto")
        name, _, value = argument.partition("=")
        if name == "--config":
            options = read_config(value or following)
            from_file = _as_typed(options)
            given = options | given
        elif name in ("--model", "--data", "--preset"):
            given[name[2:]] = value or following
    command = arguments[0] if arguments else ""
    if {"-h", "--help"}.intersection(arguments):
        return expanded, {}
    values = inherited(command, str(given.get("model", "")))
    from_model = for_source(values, str(given.get("data", "")))
    preset = given.get("preset", values.get("preset"))
    of_preset = TRAIN_PRESETS.get(preset, {}) if command == "train" and isinstance(preset, str) else {}
    expanded[1:1] = _as_typed(from_model) + _as_typed(of_preset) + from_file
    return expanded, values


def _as_typed(values: dict[str, Any]) -> list[str]:
    """Without what the preset fills in, so that another preset can be typed."""
    filled = PRESETS.get(values.get("preset", "official"), {})
    typed = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{option}" if value else f"--no-{option}")
        elif name not in filled or value != filled[name]:
            typed.append(f"--{option}={value}")
    return typed


def _has_help(config: Any) -> bool:
    return dataclasses.is_dataclass(config) and all("help" in field.metadata for field in dataclasses.fields(config))


def _struct_rule(info: Any) -> StructConstructorSpec | None:
    """Options from the fields of the config classes and their help texts."""
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


def _number_rule(info: Any) -> PrimitiveConstructorSpec | None:
    """Integers of 64 bits and numbers that float32 can hold: no option has a use for others, and few functions take them."""
    kind = info.type
    if kind not in (int, float):
        return None

    def read(words: list[str]) -> int | float:
        value = kind(words[0])
        if kind is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{words[0][:40]} has more than 64 bits")
        if kind is float and not abs(value) <= LARGEST:
            raise ValueError(f"{words[0][:40]} is not a number from -{LARGEST:g} to {LARGEST:g}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: type(value) is kind or ("~" if kind is float and type(value) is int else False),
        str_from_instance=lambda value: [str(value)],
    )
