"""Time and memory that code under attack may take."""

import faulthandler
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 20.0
MEMORY = 6 << 30  # bytes beyond what the process has, so that an absurd size is an error rather than the end of the process


class Hang(BaseException):
    """Not an Exception, which the code under attack might catch."""


@contextmanager
def limits(seconds: float = SECONDS, patience: int = 1, memory: int = MEMORY) -> Iterator[None]:
    """In this context a hang in Python code raises ``Hang``, and too much memory is an error.

    A hang below Python ends the process, with its stack, after three times as long.

    Args:
        seconds: of all CPUs together; and of the clock, times ``patience``, since others may take most of the machine.
        memory: addresses beyond the process's own, in bytes; files that are mapped take some too.
    """
    began = time.monotonic(), time.process_time()

    def stop(*_: Any) -> None:
        passed, of_cpu = time.monotonic() - began[0], time.process_time() - began[1]
        if passed >= patience * seconds or of_cpu >= seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Hang(f"no end after {passed:.0f} s, {of_cpu:.0f} s of a CPU")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    handler, limit = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, limit[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    faulthandler.dump_traceback_later(3 * patience * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, handler)
