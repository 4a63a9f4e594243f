"""The command line. Each command is a file of this folder; other packages add commands as entry points of ``GROUP``.

Exit codes: 0 done, 2 usage, 3 data, model or checkpoint, 4 a failure at run time, 75 stopped by a signal,
130 stopped in the middle of a step by a third Ctrl-C, 141 broken pipe. Errors are one line on stderr.
"""

from __future__ import annotations

import ast
import logging
import os
import sys
import textwrap
from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Any

from quietstar.cli.errors import (
    DATA,
    PIPE,
    RUNTIME,
    SAVED,
    STOPPED,
    USAGE,
    Failure,
    UsageError,
    first_line,
    one_line,
    runtime_failure,
    short_warnings,
    stopped,
)
from quietstar.run import signals

GROUP = "quietstar.commands"
OWN = {
    name: EntryPoint(name, f"quietstar.cli.{name}:{name.title()}", GROUP)
    for name in ("train", "think", "generate", "explain", "eval", "ask", "export", "merge", "doctor")
}


class Commands(UserDict[str, Any]):
    """All commands by name. A command is imported when it is asked for, since the libraries that it needs take seconds.

    Attributes:
        data: the entry point of each.
    """

    def __getitem__(self, name: str) -> Any:
        entry = self.data[name]
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            if name in OWN:
                raise
            text = f"{entry.value}, of the command {name}, can't be imported: {first_line(error)}"
            raise Failure(USAGE, text) from error

    def overview(self) -> str:
        """What ``quietstar --help`` prints."""
        width = max(map(len, self)) + 4
        lines = (f"  {name:<{width - 2}}{_purpose(entry)}" for name, entry in self.data.items())
        return OVERVIEW.format("\n".join(textwrap.fill(line, 80, subsequent_indent=" " * width) for line in lines))


def _purpose(entry: EntryPoint) -> str:
    """The first line of a docstring in the source: of the command's class or, if that is not from there, of the module."""
    try:
        source = find_spec(entry.module).loader.get_source(entry.module)  # type: ignore[union-attr]
    except (ImportError, AttributeError):
        return ""
    tree = ast.parse(source)
    described = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == entry.attr] or [tree]
    return (ast.get_docstring(described[0]) or "").partition("\n")[0]


COMMANDS = Commands(OWN | {entry.name: entry for entry in entry_points(group=GROUP)} | OWN)  # ours come first, and win

OVERVIEW = """\
usage: quietstar COMMAND [OPTIONS]

Quiet-STaR: language models that think before every token.

{}

quietstar COMMAND --help lists its options, quietstar --version prints versions."""

HELP = ("-h", "--help")

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a character that the terminal's encoding lacks is no error
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        code, text = _until_signal(list(sys.argv[1:] if arguments is None else arguments))
        if text:
            print(f"quietstar: {one_line(text)}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except BrokenPipeError:
        _drop_output()
        return PIPE
    except OSError as error:  # such as a disk that is full
        _drop_output()
        if not code:
            print(f"quietstar: the output can't be written: {first_line(error)}", file=sys.stderr)
        return code or RUNTIME
    return code


def _until_signal(arguments: list[str]) -> tuple[int, str]:
    """``_run``, which a signal ends. Whatever error that leads to in a library, it was the signal."""
    with signals.ending_at_once() as came:
        try:
            code, text = _run(arguments)
        except BaseException:
            if not came:
                raise
            code, text = STOPPED, ""
    if not came or code in (0, SAVED):
        return code, text
    entry = COMMANDS.data.get(arguments[0])
    command = getattr(sys.modules.get(entry.module), entry.attr, None) if entry else None  # None: still importing
    return SAVED, stopped(came, arguments, hasattr(command, "resume"))


def _run(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and what to say about an error."""
    wrong = _wrong_command(arguments)
    if wrong:
        return USAGE, wrong
    if arguments[0] in HELP:
        print(COMMANDS.overview())
        return 0, ""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars, whose lines a file would keep
    # Not above, since this takes seconds.
    from transformers.utils.logging import disable_progress_bar

    from quietstar.cli.options import parse
    from quietstar.run.processes import Interrupted

    disable_progress_bar()
    try:
        needed = [arguments[0]] if arguments[0] in COMMANDS else [*COMMANDS]
        with on_terminal(), short_warnings():
            parse({name: COMMANDS[name] for name in needed}, arguments).run()
        return 0, ""
    except UsageError as error:
        return USAGE, str(error)
    except Failure as error:
        return error.code, str(error)
    except ValueError as error:
        return DATA, first_line(error)
    except Interrupted as stop:
        return SAVED, f"{stop}; continue with --resume"
    except BrokenPipeError:
        raise
    except (OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        reason = runtime_failure(error)
        if reason is None:
            raise
        return RUNTIME, reason
    except Exception as error:
        if type(error) is not Exception:  # which tokenizers raises for a character that it has no token for
            raise
        return DATA, f"the tokenizer can't read the text: {first_line(error)}"
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


def _wrong_command(arguments: list[str]) -> str:
    """What to say if there is no command, or none of this name."""
    if not arguments:
        return f"name a command: {', '.join(COMMANDS)}; quietstar --help says what each does"
    name = arguments[0]
    if name in COMMANDS or name in HELP or name.startswith("--tyro-"):
        return ""
    similar = get_close_matches(name[:100], COMMANDS, n=1, cutoff=0.7)
    advice = f"did you mean {similar[0]}?" if similar else f"the commands are {', '.join(COMMANDS)}"
    return f"there is no command {name[:100]}: {advice}"


def _drop_output() -> None:
    """Drop what can't be written, or the interpreter would try once more as it exits."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nothing, stream.fileno())
    os.close(nothing)
