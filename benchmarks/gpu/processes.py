"""Processes that run at the same time under one time limit. Their output goes to one log file, line by line."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STOPPED = "stopped at its time limit"
CACHES = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}  # flash-attn-4 keeps what it compiles for the next process
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Outcome:
    """What a process left: its exit code, None if it was stopped, its output, how long it ran, and its command."""

    code: int | None
    output: str
    seconds: float
    command: tuple[str, ...] = ()

    @property
    def end(self) -> str:
        return STOPPED if self.code is None else f"exit code {self.code}"

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines() or ["no output"]
        return lines[-1][:200]


class Log:
    """A file that lines are added to. What was in it is kept."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", buffering=1, errors="replace")
        self.lock = threading.Lock()

    def add(self, line: str) -> None:
        with self.lock:
            self.file.write(line.rstrip("\n") + "\n")


class _Running:
    """A process whose output is read on a thread."""

    def __init__(self, title: str, command: list[str], environment: dict[str, str], log: Log):
        log.add(f"{title} $ {' '.join(command)}")
        self.command = tuple(command)
        self.code: int | None = None
        self.began = self.ended = time.monotonic()
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self.reader = threading.Thread(target=self._read, args=(title, log), daemon=True)
        self.reader.start()

    def _read(self, title: str, log: Log) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            log.add(f"{title} | {line}")
        self.ended = time.monotonic()

    def wait(self, seconds: float) -> None:
        """For at most ``seconds``. ``code`` stays None if it still runs then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.code = self.process.wait(max(0.1, seconds))

    def outcome(self) -> Outcome:
        """After ``stop``."""
        self.process.wait()
        self.reader.join(5)
        ended = time.monotonic() if self.code is None else self.ended
        return Outcome(self.code, "".join(self.lines), ended - self.began, self.command)

    def stop(self) -> None:
        """Kill the process and all that it started, without waiting for their end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_together(
    stage: str, commands: dict[str, list[str]], limit: float, log: Log, variables: dict[str, str] | None = None
) -> dict[str, Outcome]:
    """Run all commands at once. A process still running after ``limit`` seconds is stopped, with all that it started.

    Args:
        commands: by name. In the log each line begins with the stage and that name.
        variables: environment variables in addition to those of this process. PYTHONPATH always begins with this checkout, so
            that nothing has to be installed.
    """
    path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"} | CACHES | (variables or {})
    deadline = time.monotonic() + limit
    running: dict[str, _Running] = {}
    try:
        for name, command in commands.items():
            running[name] = _Running(f"{stage}, {name}", command, environment, log)
        for process in running.values():
            process.wait(deadline - time.monotonic())
    finally:
        for process in running.values():  # all at once: a process on a GPU takes its time to end
            process.stop()
    outcomes = {name: process.outcome() for name, process in running.items()}
    for name, outcome in outcomes.items():
        log.add(f"{stage}, {name} = {outcome.end}, {outcome.seconds:.1f} s")
    return outcomes
