"""The command line. Each command is a file of this folder; other packages add commands as entry points of ``GROUP``.

Exit codes: 0 done, 2 usage, 3 data, model or checkpoint, 4 a failure at run time, 75 stopped by a signal and saved,
130 stopped with nothing to save, 141 nobody reads the output any more. Errors are one line on stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import entry_points
from io import TextIOWrapper
from typing import Any

from transformers.utils.logging import disable_progress_bar

from quietstar.cli import common
from quietstar.cli.ask import Ask
from quietstar.cli.common import DATA, PIPE, RUNTIME, SAVED, STOPPED, USAGE, Failure, UsageError
from quietstar.cli.doctor import Doctor
from quietstar.cli.eval import Eval
from quietstar.cli.explain import Explain
from quietstar.cli.export import Export
from quietstar.cli.generate import Generate
from quietstar.cli.options import parse
from quietstar.cli.think import Think
from quietstar.cli.train import Train
from quietstar.run.processes import Interrupted

GROUP = "quietstar.commands"
OWN = {command.__name__.lower(): command for command in (Train, Think, Generate, Explain, Eval, Ask, Export, Doctor)}


class Commands(Mapping[str, Any]):
    """All commands by name. Those of other packages are imported when they are asked for."""

    def __init__(self) -> None:
        self._others = {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in OWN}

    def __iter__(self) -> Iterator[str]:
        yield from (*OWN, *self._others)

    def __len__(self) -> int:
        return len(OWN) + len(self._others)

    def __getitem__(self, name: str) -> Any:
        if name in OWN:
            return OWN[name]
        entry = self._others[name]
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            text = f"{entry.value}, of the command {name}, can't be imported: {common.first_line(error)}"
            raise Failure(USAGE, text) from error

    def needed_by(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The commands to choose from: the other packages' alone that is named, or all of them for --help and completion."""
        every = arguments[0].startswith("-")
        return {name: self[name] for name in self if name in OWN or every or name == arguments[0]}


COMMANDS = Commands()

# How to let a shell complete commands and options; no Markdown.
COMPLETION = """\
The Tab key completes commands and options after one of these, which need a new shell to take effect:

bash, where the package bash-completion is installed
    folder=~/.local/share/bash-completion/completions; mkdir -p $folder
    quietstar --tyro-write-completion bash $folder/quietstar

zsh, with fpath+=(~/.zfunc) before compinit in ~/.zshrc
    mkdir -p ~/.zfunc
    quietstar --tyro-write-completion zsh ~/.zfunc/_quietstar

fish
    mkdir -p ~/.config/fish/completions
    quietstar --tyro-write-completion fish ~/.config/fish/completions/quietstar.fish
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``SystemExit`` after --help and on options that can't be read."""
    disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a character that the terminal's encoding lacks is no error
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        code, text = _run(list(sys.argv[1:] if arguments is None else arguments))
        if text:
            print(f"quietstar: {common.one_line(text)}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except BrokenPipeError:
        _drop_output()
        return PIPE
    except OSError as error:  # such as a disk that is full
        _drop_output()
        if not code:
            print(f"quietstar: the output can't be written: {common.first_line(error)}", file=sys.stderr)
        return code or RUNTIME
    return code


def _run(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and what to say about an error."""
    try:
        _check_command(arguments)
        with on_terminal(), common.short_warnings():
            parse(COMMANDS.needed_by(arguments), arguments).run()
        return 0, ""
    except UsageError as error:
        return USAGE, str(error)
    except Failure as error:
        return error.code, str(error)
    except ValueError as error:
        return DATA, common.first_line(error)
    except Interrupted as stop:
        return SAVED, f"{stop}; continue with --resume"
    except BrokenPipeError:
        raise
    except (OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        reason = common.runtime_failure(error)
        if reason is None:
            raise
        return RUNTIME, reason
    except KeyboardInterrupt:
        return STOPPED, "stopped; nothing was saved since the last checkpoint or round"


@contextmanager
def on_terminal() -> Iterator[None]:
    """In this context the log "quietstar" goes to stderr."""
    log, handler = logging.getLogger("quietstar"), logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _check_command(arguments: list[str]) -> None:
    """Raises UsageError if there is no command, or none of this name."""
    if not arguments:
        raise UsageError(f"name a command: {', '.join(COMMANDS)}; quietstar --help says what each does")
    name = arguments[0]
    if name in COMMANDS or name.startswith("-"):
        return
    similar = get_close_matches(name[:100], COMMANDS, n=1, cutoff=0.7)
    advice = f"did you mean {similar[0]}?" if similar else f"the commands are {', '.join(COMMANDS)}"
    raise UsageError(f"there is no command {name[:100]}: {advice}")


def _drop_output() -> None:
    """Drop what can't be written, or the interpreter would try once more as it exits."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nothing, stream.fileno())
    os.close(nothing)
