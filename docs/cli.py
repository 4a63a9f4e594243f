"""Write docs/cli.md from the commands, their options and the texts of --help.

python docs/cli.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from quietstar.cli import inherit, main
from quietstar.config import PRESETS

KINDS = {int: "integer", float: "number", str: "text"}
PAGE = """\
# Command line

All commands with all their options. `quietstar COMMAND --help` says the same; [docs/cli.py](cli.py) generates this page.

{contents}

## Exit codes

{exit_codes}

An error is one sentence on stderr.

## Config files

`quietstar train --config FILE` reads options from a JSON or YAML file that maps their names to values, with `_` for `-`. Typed
options win over those of the file. A run writes all its options to `config.json` in its folder. That file starts the same run
again, or a changed one:

```sh
quietstar train --config runs/first/config.json --out runs/second --steps 200
```

## Models and runs

`--model` takes a folder or a name on the hub. The folder of a run stands for its newest checkpoint, that of a recipe for its
best round or its result. A checkpoint knows the data of its run, what was held out, and how it thinks. These commands take from
there what nobody types, and print what is typed otherwise: {inheriting}.
`explain` without a text takes one that was held out.
`--preset small` of `train` brings its learning rate along.

## Resuming

A run that was stopped, by Ctrl-C, a signal or a crash, continues from its newest whole checkpoint or round. `train` then gives
the numbers that it would have given without the stop, to the last bit:

```sh
quietstar train --config runs/first/config.json --resume
```

These commands take `--resume`: {resumable}. `--resume` alone is `--resume auto`; `train` also takes the path of a checkpoint.
The options of a run stay as they were, since its numbers depend on them. Of `train` these may change: {may_differ}.

## Completion

{completion}

{commands}
"""


class Option(NamedTuple):
    """An option of a command, as --help describes it.

    Attributes:
        name: with dashes; of a positional argument, its metavar.
        kind: the type of its values.
        default: ``dataclasses.MISSING`` if there is none.
        fixed: whether a resumed run must have the same value.
    """

    name: str
    kind: Any
    default: Any
    help: str
    positional: bool
    fixed: bool


def page() -> str:
    return PAGE.format(
        contents="\n".join(f"- [{name}](#quietstar-{name}): {summary(command)}" for name, command in main.COMMANDS.items()),
        exit_codes="\n".join(table(("code", "meaning"), exit_codes())),
        may_differ=", ".join(f"`--{option.name}`" for option in options_of(main.COMMANDS["train"]) if not option.fixed),
        inheriting=", ".join(f"`{name}`" for name in inherit.DATA),
        resumable=", ".join(f"`{name}`" for name, command in main.COMMANDS.items() if "resume" in names_of(command)),
        completion=completion(),
        commands="\n\n".join(block for name, command in main.COMMANDS.items() for block in command_blocks(name, command)),
    )


def summary(command: type) -> str:
    return " ".join(inspect.getdoc(command).partition("\n\n")[0].split())


def exit_codes() -> list[tuple[str, str]]:
    """(code, meaning), from the docstring of the command line."""
    sentence = " ".join(re.search(r"Exit codes: (.*?)\.\s", main.__doc__, re.DOTALL)[1].split())
    return re.findall(r"(\d+) (.+?)(?:, (?=\d)|$)", sentence)


def completion() -> str:
    text = getattr(main, "COMPLETION", "")
    return f"```text\n{text.strip()}\n```" if text else "`quietstar --tyro-write-completion bash FILE`, or `zsh`, or `fish`."


def command_blocks(name: str, command: type) -> Iterator[str]:
    groups = dict(option_groups(command))
    options = [option for group in groups.values() for option in group]
    texts = [option.name if required(option) else f"[{option.name}]" for option in options if option.positional]
    needed = [f"--{option.name} ..." for option in options if required(option) and not option.positional]
    yield f"## quietstar {name}"
    yield inspect.getdoc(command)
    yield f"```sh\n{' '.join(['quietstar', name, *texts, *needed, '[options]'])}\n```"
    for title, group in groups.items():
        if title:
            yield f"**{title}**"
        yield "\n".join(table(("option", "value", "default", "what it does"), map(row, group)))


def option_groups(command: type) -> Iterator[tuple[str, list[Option]]]:
    """The command's own options, and those of each of its config classes, by title."""
    hints = get_type_hints(command, include_extras=True)
    fields = dataclasses.fields(command)
    configs = [field for field in fields if dataclasses.is_dataclass(hints[field.name])]
    yield "", [described(field, hints[field.name]) for field in fields if field not in configs]
    for field in configs:
        kinds = get_type_hints(hints[field.name])
        options = [described(option, kinds[option.name]) for option in dataclasses.fields(hints[field.name])]
        yield f"{field.name.capitalize()} options", options


def options_of(command: type) -> list[Option]:
    return [option for _, group in option_groups(command) for option in group]


def names_of(command: type) -> list[str]:
    return [option.name for option in options_of(command)]


def described(field: dataclasses.Field[Any], hint: Any) -> Option:
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    argument = next((note for note in notes if hasattr(note, "help")), None)
    positional = Positional in notes
    name = argument.metavar if argument and positional else field.name.replace("_", "-")
    text = argument.help if argument else field.metadata["help"]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Option(name, kind, default, text, positional, not field.metadata.get("may_differ"))


def required(option: Option) -> bool:
    return option.default is dataclasses.MISSING


def row(option: Option) -> tuple[str, str, str, str]:
    flag = option.kind is bool
    name = option.name if option.positional else f"--{option.name}"
    names = f"`{name}`, `--no-{option.name}`" if flag else f"`{name}`"
    return names, "" if flag else kind_text(option.kind), default_text(option), option.help


def kind_text(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return alternatives([f"`{value}`" for value in parts if value != ""])
    if origin in (Union, types.UnionType):
        return alternatives([kind_text(part) for part in parts])
    if origin is tuple:
        return f"{KINDS[parts[0]]}s"
    return "`None`" if kind is type(None) else KINDS[kind]


def alternatives(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def default_text(option: Option) -> str:
    name, value = option.name.replace("-", "_"), option.default
    if required(option):
        return "required"
    if value is None and name in PRESETS["official"]:
        return "the preset's"
    if option.kind is bool:
        return "on" if value else "off"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"`{value}`" for value in values if value != "")


def table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page())
