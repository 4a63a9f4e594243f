"""What a run tells while it goes on."""

import logging

import pytest

from quietstar.recipes.common import log as telling
from quietstar.recipes.common.log import SECONDS, Pace, ToldMetrics, on_terminal, tell
from quietstar.recipes.common.rounds import Rounds
from quietstar.recipes.common.sampling import rollout
from quietstar.run.resume import Settings


@pytest.fixture
def clock(monkeypatch):
    """Stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_what_a_run_is_followed_by(capsys):
    with on_terminal():
        tell("runs/star", {"round": 1, "accuracy": 0.51234, "kept": 2980, "seconds": 3.0})
    tell("runs/star", {"round": 2})
    assert capsys.readouterr().err == "runs/star: round 1, kept 2,980, accuracy 0.512\n"
    assert not logging.getLogger("quietstar").handlers and not telling.told()


def test_updates_are_told_at_a_pace(tmp_path, clock, capsys):
    metrics = ToldMetrics(tmp_path / "metrics.jsonl", 0)
    with on_terminal():
        for step in range(1, 31):
            clock[0] += SECONDS / 10
            metrics.add({"step": step, "loss": 1 / step})
    told = capsys.readouterr().err.splitlines()
    assert [line.rsplit("/", 1)[-1] for line in told] == [f"{tmp_path.name}: step {n}, loss {1 / n:.3f}" for n in (10, 20, 30)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


def test_the_pace_begins_anew_with_each_line(clock):
    pace = Pace()
    assert not pace.due()
    clock[0] += SECONDS
    assert pace.due() and not pace.due()


def test_a_round_is_told_when_it_is_whole(tmp_path, solver, capsys):
    model, task = solver
    with on_terminal():
        Rounds(tmp_path / "run", Settings.of(), resume=False).save(1, model, task, {"round": 1, "accuracy": 0.5})
    assert f"{tmp_path / 'run'}: round 1, accuracy 0.500\n" in capsys.readouterr().err


def test_long_sampling_is_told(solver, capsys, monkeypatch):
    model, task = solver
    monkeypatch.setattr(telling, "SECONDS", 0)
    with on_terminal():
        rollout(model, task, [[1, 2, 3]] * 5, max_new=2, batch_size=2)
    assert capsys.readouterr().err.splitlines() == [f"sampling: {n} of 5 completions" for n in (0, 2, 4)]
