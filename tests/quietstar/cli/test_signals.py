"""A signal at any moment of a command ends it with exit code 75 and a sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quietstar.cli import errors
from quietstar.run import signals

ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def test_while_libraries_are_imported(tmp_path):
    command = [sys.executable, "-m", "quietstar", "train", "--model=x", "--data=y"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    # Python itself has begun by now, and the libraries take seconds.
    while "libtorch" not in Path(f"/proc/{running.pid}/maps").read_text() and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGUSR1)
    error = running.communicate()[1]
    assert running.returncode == errors.SAVED, error
    (said,) = error.split("\n\n")[-1].strip().splitlines()
    assert said.startswith("quietstar: stopped by SIGUSR1; ") and "--model=x" in said
    assert list(tmp_path.iterdir()) == []


def raised(number):
    def stand_in(*arguments, **options):
        signal.raise_signal(number)
        raise AssertionError("it went on")

    return stand_in


def swallowed(number):
    """What libraries make of an exception that comes in the middle of theirs."""

    def stand_in(*arguments, **options):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ImportError("core failed to import") from error

    return stand_in


@pytest.mark.parametrize("number, form", [*((x, raised) for x in ASKS), (signal.SIGTERM, swallowed)])
def test_outside_the_loop(quietstar, monkeypatch, number, form):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
    monkeypatch.setattr("quietstar.cli.train.load_data", form(number))
    monkeypatch.setattr("quietstar.cli.eval.common.load_checkpoint", form(number))
    options = ("train", "--model=model", "--data=text.txt", "--out=run")
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    code, _, err = quietstar(*options)
    assert code == errors.SAVED
    assert err == [
        f"quietstar: stopped by {name}; what was saved before is whole; continue with: quietstar {' '.join(options)} --resume"
    ]
    assert not os.path.exists("run")
    code, _, err = quietstar("eval", "--model=model", "--data=text.txt")
    assert code == errors.SAVED and "start again with: quietstar eval --model=model --data=text.txt" in err[-1]
    signal.signal(signal.SIGHUP, before)


SECOND = """
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGUSR1)
"""
LOST = """
    class Thing:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)
    Thing()
"""


@pytest.mark.parametrize("body, name", [(SECOND, "SIGUSR1"), (LOST, "SIGTERM")])
def test_a_second_signal_and_one_where_exceptions_are_lost_end_the_process(body, name):
    code = f"import signal\nfrom quietstar.run import signals\nwith signals.ending_at_once():{body}    print('it went on')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (75, "") and f"stopped by {name}" in ended.stderr


def test_a_forked_worker_ends():
    number = signal.SIGTERM
    with signals.ending_at_once() as came:
        child = os.fork()
        if child == 0:
            signal.raise_signal(number)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number and not came
