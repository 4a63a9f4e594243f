"""Commands that end in SIGKILL: ``python killing.py`` imports everything once, then forks a process for each command."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT = 600  # seconds of a command
NOT_SAVED = {".quietstar.lock", ".notes"}  # hidden files and folders that no save writes


@dataclass
class Ended:
    """How a command ended: its exit code, negative for a signal; the seconds it took; and the changes it made inside saves."""

    code: int
    seconds: float
    changes: list[str]


class Commands:
    """Runs commands in processes that have everything imported, so that one starts in a moment."""

    def __init__(self):
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a process that forks must have no threads
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, __file__], env=one_thread, **pipes)

    def run(
        self, arguments: list[str], folder: Path, seconds: float = 0, change: int = 0, number: int = signal.SIGKILL
    ) -> Ended:
        """Run ``quietstar`` with these arguments in ``folder``.

        Args:
            seconds: the signal ``number`` after this time, unless it is 0.
            change: SIGKILL right before the command's so many-th change inside a save, unless it is 0; before the next one
                where this one begins the save, since that would leave nothing of it.
        """
        request = {"arguments": arguments, "folder": str(folder), "seconds": seconds, "change": change, "number": number}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def in_a_save(path) -> bool:
    """Whether a path is a temporary file or folder, which saves write to, or inside one."""
    return any(part.startswith(".") and part not in NOT_SAVED for part in Path(path).parts)


def begun_a_save(folder: Path) -> bool:
    """Whether a folder has something that an unfinished save wrote."""
    return any(in_a_save(path.relative_to(folder)) for path in folder.rglob("*"))


CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")  # audit events whose values begin with paths


def changed_paths(event: str, values: tuple) -> list[str]:
    """The absolute paths that an audit event is about to change."""
    if event == "open":
        paths = values[:1] if values[2] & (os.O_WRONLY | os.O_RDWR) else ()
    elif event in ("os.remove", "os.rmdir") and values[1] != -1:  # relative to an open folder
        paths = [os.path.join(os.readlink(f"/proc/self/fd/{values[1]}"), values[0])]
    else:
        paths = values[:2] if event in CHANGES else ()
    return [os.path.abspath(os.fsdecode(path)) for path in paths if isinstance(path, (str, bytes, os.PathLike))]


def watch(journal: int, kill_before: int) -> None:
    """Log this process's changes to temporary files and folders below the current one. SIGKILL before one of them."""
    home, count = f"{os.getcwd()}{os.sep}", 0

    def hook(event, values):
        nonlocal count
        inside = [path.removeprefix(home) for path in changed_paths(event, values) if path.startswith(home)]
        if any(map(in_a_save, inside)):
            count += 1
            os.write(journal, f"{event} {' '.join(inside)}\n".encode())
            if 0 < kill_before <= count and begun_a_save(Path(home)):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(arguments, folder, journal, change):
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    watch(journal, change)
    code = 1
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def answer(arguments, folder, seconds, change, number):
    with tempfile.TemporaryFile() as journal:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            run(arguments, folder, journal.fileno(), change)
        if signal.sigtimedwait({signal.SIGCHLD}, seconds or LIMIT) is None:
            os.kill(child, number)
            signal.sigwait({signal.SIGCHLD})
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.monotonic() - began
        journal.seek(0)
        return {"code": status, "seconds": seconds, "changes": journal.read().decode().splitlines()}


if __name__ == "__main__":
    # What the commands import at their first use comes first too.
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from trl import DPOConfig, DPOTrainer  # noqa: F401

    from quietstar.cli.main import COMMANDS, main

    for command in COMMANDS:
        COMMANDS[command]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests, and nothing would end by it
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
