"""The installed command ``quietstar``: versions, and what to say where libraries are missing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from quietstar import NEEDED
from quietstar.cli.errors import USAGE, stopped
from quietstar.run import signals

PACKAGES = ("quietstar-kernels", "torch", "triton", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, as ``quietstar.cli.main.main`` does."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["-V"]):
        print(versions())
        return 0
    with signals.ending_at_once() as came:
        try:
            code = _main(words)
        except KeyboardInterrupt:
            signals.say(f"quietstar: {stopped(came, words)}")
            code = signals.CODE
    if arguments is None:  # the process is about to end, with the exit code of what was done
        for number in {*signals.NUMBERS} - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)
    return code


def _main(words: list[str]) -> int:
    try:
        from quietstar.cli.main import main as run  # not above: signals are answered by now

        return run(words)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f"quietstar: the command needs {error.name}, of the train extra: pip install -e '.[train]' in a checkout",
            file=sys.stderr,
        )
        return USAGE


def versions() -> str:
    """The versions of what a result depends on, in one line."""
    import platform  # here, as signals are answered before it is imported

    found = [f"{name} {version}" if (version := version_of(name)) else f"no {name}" for name in PACKAGES]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def version_of(package: str) -> str | None:
    """None if it is not installed."""
    from importlib import metadata  # likewise

    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
