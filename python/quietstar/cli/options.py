"""Builds a command from the command line, config files and the checkpoint's saved options."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec

from quietstar.checkpoints import native
from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import check_ignored
from quietstar.config import PRESETS, TRAIN_PRESETS, filled_by
from quietstar.data.held_out import data_config
from quietstar.data.sources import absolute, joined
from quietstar.files.reading import read_yaml

LARGEST = 1e30
LONGEST, LONG = 4096, ("prompt", "answer_prefix")  # characters of an option with its value; options that may be longer


def parse(commands: Mapping[str, type], arguments: list[str]) -> Any:
    """One of the commands, made from what was typed. Exits after --help and, with code 2, where tyro can't read an option."""
    typed = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    _check_texts(arguments)
    _check_typed(commands, arguments)
    arguments, from_model = _expand(commands, arguments)
    registry = ConstructorRegistry()
    registry.struct_rule(_struct_rule)
    registry.primitive_rule(_number_rule)
    command = tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog="quietstar",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )
    check_ignored(getattr(command, "ignored", ()), flat(command), typed)
    report_changes(getattr(command, "model", ""), from_model, flat(command))
    return command


def read_config(path: str | Path) -> dict[str, Any]:
    """Options by name from a JSON or YAML file."""
    try:
        return read_yaml(path, dict[str, bool | int | float | str | None])
    except ValueError as error:
        raise UsageError(f"{error}; a config file must map options to values") from error


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


def option_types(command: Any) -> dict[str, Any]:
    """The types of a command's options by name, with those of its config classes; empty for a command of another package."""
    if not dataclasses.is_dataclass(command) or not command.__module__.startswith("quietstar"):
        return {}
    hints, found = typing.get_type_hints(command), dict[str, Any]()
    for field in dataclasses.fields(command):
        kind = hints[field.name]
        found |= option_types(kind) if dataclasses.is_dataclass(kind) else {field.name: kind}
    return found


def _check_typed(commands: Mapping[str, type], arguments: list[str]) -> None:
    """Refuse options that the command hasn't, and say which value counts where one is given twice."""
    command = arguments[0] if arguments else ""
    options = option_types(commands[command]) if command in commands else {}
    if not options or {"-h", "--help"}.intersection(arguments):
        return
    given: dict[str, str] = {}
    for i, argument in enumerate(arguments):
        typed, equals, value = argument.partition("=")
        name = typed[2:].replace("-", "_")
        if not name or not typed.startswith("--") or name.startswith("tyro_"):
            continue
        positive = name if name in options else name.removeprefix("no_")
        _check_name(command, positive, options, typed[:100])
        following = "".join(arguments[i + 1 : i + 2])
        value = value if equals else typed if following.startswith("--") else following
        if given.get(positive, value) != value and positive not in ("config", "data") and os.environ.get("RANK", "0") == "0":
            file = sys.stdout if hasattr(commands[command], "inherits") else sys.stderr  # as ``report_changes``
            print(f"--{positive.replace('_', '-')} was given twice: {value} counts, not {given[positive]}", file=file)
        given[positive] = value


def _check_name(command: str, name: str, options: Mapping[str, Any], shown: str) -> None:
    if name not in options:
        similar = get_close_matches(name[:100], options, n=1, cutoff=0.7)
        advice = f"did you mean --{similar[0].replace('_', '-')}? " if similar else ""
        raise UsageError(f"quietstar {command} has no option {shown}: {advice}quietstar {command} --help lists them")


def flat(command: Any) -> dict[str, Any]:
    """All options of a command by name, with those of its config classes."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        values |= vars(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def _expand(commands: Mapping[str, type], arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments, and the options that are taken over from the model. Later options win, so before the typed ones come

    - what is taken over from the model,
    - what a preset says,
    - what a config file says;

    and auto is put after a --resume that has no value.
    """
    arguments = _one_data(arguments)
    expanded: list[str] = []
    command = arguments[0] if arguments else ""
    given: dict[str, Any] = {}  # what is typed or in a config file
    from_files: dict[str, Any] = {}  # the last of several files wins
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        expanded.append(argument)
        if argument == "--resume" and following.startswith("--"):
            expanded.append("auto")
        name, _, value = argument.partition("=")
        if name == "--config":
            from_files |= _checked(command, commands, value or following)
        elif name in ("--model", "--data", "--preset"):
            given[name[2:]] = value or following
    given = from_files | given
    if {"-h", "--help"}.intersection(arguments):
        if command in ("train", "doctor") and given.get("preset") in PRESETS:
            print(preset_text(str(given["preset"])))
        return expanded, {}
    values = inherited(commands.get(command), str(given.get("model", "")))
    from_model = for_source(values, str(given.get("data", "")))
    preset = given.get("preset", values.get("preset"))
    of_preset = TRAIN_PRESETS.get(preset, {}) if command in ("train", "doctor") and isinstance(preset, str) else {}
    expanded[1:1] = _as_typed(from_model) + _as_typed(of_preset) + _as_typed(from_files)
    return expanded, values


def _one_data(arguments: list[str]) -> list[str]:
    """The arguments with one --data in place of several: their sources with commas between."""
    places = [i for i, x in enumerate(arguments) if x.partition("=")[0] == "--data"]
    if len(places) < 2:
        return arguments
    apart = {i + 1 for i in places if arguments[i] == "--data" and i + 1 < len(arguments)}  # values after a space
    values = [arguments[i + 1] if i + 1 in apart else arguments[i].partition("=")[2] for i in places]
    kept = [x for i, x in enumerate(arguments) if i not in apart and i not in places]
    return [*kept[:1], f"--data={joined(values)}", *kept[1:]]


def _checked(command: str, commands: Mapping[str, type], path: str) -> dict[str, Any]:
    """The options of a file, which the command must have. YAML reads no as false, also where an option has the value no."""
    options, values = option_types(commands[command]) if command in commands else {}, read_config(path)
    for name, value in values.items() if options else ():
        _check_name(command, name.replace("-", "_"), options, f"{name!r}, which {path} has")
        kind = options[name.replace("-", "_")]
        if isinstance(value, bool) and bool not in (kind, *typing.get_args(kind)):
            values[name] = "yes" if value else "no"
    return values


def preset_text(preset: str) -> str:
    """What a preset fills, as options."""
    values = {name: x for name, x in (filled_by(preset) | TRAIN_PRESETS.get(preset, {})).items() if x != ""}
    return "\n".join(
        [f"{preset} fills, where nothing else is typed:", *(f"  --{name.replace('_', '-')}={x}" for name, x in values.items())]
    )


def _as_typed(values: dict[str, Any]) -> list[str]:
    """Without what the preset fills in, so that another preset can be typed."""
    preset = values.get("preset", "official")
    filled = filled_by(preset) if preset in PRESETS else {}
    typed = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{option}" if value else f"--no-{option}")
        elif name not in filled or value != filled[name]:
            typed.append(f"--{option}={value}")
    return typed


def _struct_rule(info: Any) -> StructConstructorSpec | None:
    """Options from the fields of the config classes and their help texts."""
    config = info.type
    described = dataclasses.is_dataclass(config) and all("help" in field.metadata for field in dataclasses.fields(config))
    if not described:
        return None

    def make(**values: Any) -> Any:
        try:
            return config(**values)
        except ValueError as error:
            raise UsageError(str(error)) from error

    hints, filled = typing.get_type_hints(config), filled_by("official")

    def kind(field: Any) -> Any:
        if field.default is not None:
            return hints[field.name]
        hint = "default: none"
        if field.name in filled:
            hint = f"the preset's; {'empty' if filled[field.name] == '' else filled[field.name]} in official"
        return Annotated[hints[field.name] | None, tyro.conf.arg(help_behavior_hint=f"({hint})")]

    options = [
        StructFieldSpec(
            name=field.name,
            type=kind(field),
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


# How a run reads its data, not what it reads: another file has fields and splits of its own.
OF_SOURCE = ("data", "text_field", "split", "hub_texts", "held_out_split")


def inherited(command: Any, model: str) -> dict[str, Any]:
    """Options by name from the description of the checkpoint ``model``; none where it has none.

    Those that the command takes over are its ``inherits``: names of options, and config classes for all of theirs.
    """
    kinds = getattr(command, "inherits", ())
    if not model or model.startswith("-") or not kinds:
        return {}
    description = native.read_description(model)
    if description is None:
        return {}
    thoughts, runs = description
    values = thoughts.to_dict() | (asdict(data_config(runs[-1])) if runs else {})
    wanted = {name for kind in kinds for name in ([kind] if isinstance(kind, str) else kind.__dataclass_fields__)}
    return {name: value for name, value in values.items() if name in wanted}


def for_source(values: dict[str, Any], data: str) -> dict[str, Any]:
    """The options that make sense for ``data``: not those of another source."""
    if not data or data == values.get("data") or _same_file(data, values.get("data")):
        return values
    return {name: value for name, value in values.items() if name not in OF_SOURCE}


def report_changes(model: str, values: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Print which options differ from the checkpoint's; of several processes, only the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    changed = [
        f"{name.replace('_', '-')} {used[name]} instead of {value}"
        for name, value in values.items()
        if name in used and used[name] != value and not (name == "data" and _same_file(used[name], value))
    ]
    if changed:
        print(f"not as in {model}: {', '.join(changed)}")


def _same_file(one: Any, other: Any) -> bool:
    return isinstance(one, str) and isinstance(other, str) and other in (absolute(one), os.path.realpath(one))
