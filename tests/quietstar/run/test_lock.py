"""One run at a time in a folder: who is refused, and what a dead owner leaves."""

import importlib
import inspect
import json
import multiprocessing
import os
import signal
import socket
from dataclasses import dataclass

import pytest

from quietstar.config import TrainConfig
from quietstar.files.writing import FileLock
from quietstar.run.lock import LOCK, alone_in_out, only_run_in
from quietstar_recipes import fast, internalize, score, solve, star, vstar

fork = multiprocessing.get_context("fork")


class Other:
    """Another process that runs a function, which gets a pipe's end, and lives until the end of the test."""

    def __init__(self, function, *args):
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=function, args=(*args, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def hold(out, pipe):
    with only_run_in(out):
        pipe.send("held")
        pipe.recv()
    pipe.send("given back")


def hold_with_a_child(out, pipe):
    with only_run_in(out):
        pid = os.fork()  # it outlives its parent, as workers may
        if pid == 0:
            signal.pause()
        pipe.send(pid)
        signal.pause()


def test_a_second_run_is_refused_and_may_follow(tmp_path):
    other = Other(hold, tmp_path / "run")
    assert other.pipe.recv() == "held"
    who = rf"\(process {other.process.pid} on {socket.gethostname()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d.*\)"
    refused = f"run: another run is writing there {who}: take another out, or let it end$"
    with pytest.raises(ValueError, match=refused), only_run_in(tmp_path / "run"):
        pass
    with only_run_in(tmp_path / "elsewhere"):
        other.pipe.send("end")
        assert other.pipe.recv() == "given back"
    with only_run_in(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []  # folders that were made and stayed empty are gone, with their locks


@pytest.mark.parametrize("holder", [hold, hold_with_a_child])
def test_a_killed_run_is_taken_over_and_that_is_said(tmp_path, capsys, holder):
    other = Other(holder, tmp_path)
    child = other.pipe.recv()
    other.kill()
    try:
        with only_run_in(tmp_path):
            owner = json.loads((tmp_path / LOCK).read_text())
            assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
        assert f"removing the stale lock of process {other.process.pid} on " in capsys.readouterr().out
        assert not (tmp_path / LOCK).exists()
    finally:
        if holder is hold_with_a_child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1, "host": "here", "since": "then"}', "[]"])
def test_what_a_kill_at_any_moment_leaves_blocks_nobody(tmp_path, content):
    """Also if the process number belongs to a living process now: the file alone locks nothing."""
    (tmp_path / LOCK).write_text(content)
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_it_is_given_back_after_an_error_and_may_be_nested(tmp_path):
    with pytest.raises(KeyError), only_run_in(tmp_path), only_run_in(f"{tmp_path}/."):
        raise KeyError
    assert not (tmp_path / LOCK).exists()
    other = Other(hold, tmp_path)
    assert other.pipe.recv() == "held"


def race(path, rounds, pipe):
    """Take and remove the lock again and again; alone, a counter beside it never changes while the lock is held."""
    counter, won = path.with_name("counter"), 0
    while won < rounds:
        lock = FileLock.acquire(path)
        if lock is None:
            continue
        before = int(counter.read_text())
        counter.write_text(str(before + 1))
        won += 1
        lock.release(remove=won % 2 == 0)
    pipe.send(won)


def test_no_two_hold_it_at_once(tmp_path):
    (tmp_path / "counter").write_text("0")
    racers = [Other(race, tmp_path / "lock", 40) for _ in range(3)]
    assert [racer.pipe.recv() for racer in racers] == [40] * 3
    assert (tmp_path / "counter").read_text() == "120"


@dataclass
class Config:
    out: str


def test_the_function_of_a_run_holds_the_lock_of_its_out(tmp_path):
    @alone_in_out(Config)
    def run(data, config=None):
        return (tmp_path / LOCK).exists()

    assert run([], Config(str(tmp_path))) and run([], config=Config(str(tmp_path)))
    assert not run([], {"out": str(tmp_path)})  # not a config: the function itself says so
    other = Other(hold, tmp_path)
    other.pipe.recv()
    with pytest.raises(ValueError, match="another run is writing there"):
        run([], Config(str(tmp_path)))


RUNS = {
    "quietstar.training": ("train", TrainConfig),
    "quietstar_recipes.star": ("star", star.Config),
    "quietstar_recipes.vstar": ("vstar", vstar.Config),
    "quietstar_recipes.score": ("score", score.Config),
    "quietstar_recipes.internalize": ("internalize", internalize.Config),
    "quietstar_recipes.internalize.kd": ("distill", internalize.Config),
    "quietstar_recipes.fast": ("fast", fast.Config),
    "quietstar_recipes.solve": ("solve", solve.Config),
}


@pytest.mark.parametrize("module", RUNS)
def test_every_kind_of_run_holds_it(tmp_path, module):
    name, kind = RUNS[module]
    function = getattr(importlib.import_module(module), name)
    given = dict.fromkeys({"qs", "model", "task", "data", "held_out"} & inspect.signature(function).parameters.keys())
    other = Other(hold, tmp_path)
    other.pipe.recv()
    with pytest.raises(ValueError, match="another run is writing there"):
        function(**given, config=kind(out=str(tmp_path)))
