"""What a run logs."""

import logging

import pytest

from quietstar.cli.main import on_terminal
from quietstar.run import metrics
from quietstar.run.metrics import SECONDS
from quietstar.run.resume import Settings
from quietstar_recipes.common import log
from quietstar_recipes.common.log import LoggedMetrics, log_figures
from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.common.saving import Rounds


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when the test sets it."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_a_line_shows_the_figures_worth_following(capsys):
    with on_terminal():
        log_figures("runs/star", {"round": 1, "accuracy": 0.51234, "kept": 2980, "seconds": 3.0})
    log_figures("runs/star", {"round": 2})
    assert capsys.readouterr().err == "runs/star: round 1, kept 2,980, accuracy 0.512\n"
    assert not logging.getLogger("quietstar").handlers and not log.LOG.isEnabledFor(logging.INFO)


def test_updates_are_logged_at_most_every_few_seconds(tmp_path, clock, capsys):
    figures = LoggedMetrics(tmp_path / "metrics.jsonl", 0)
    with on_terminal():
        for step in range(1, 31):
            clock[0] += SECONDS / 10
            figures.add({"step": step, "loss": 1 / step})
    logged = capsys.readouterr().err.splitlines()
    shown = [line.rsplit("/", 1)[-1] for line in logged]
    assert shown == [f"{tmp_path.name}: step {n}, loss {1 / n:.3f}" for n in (10, 20, 30)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


def test_a_finished_round_is_logged_and_a_users_own_best_is_kept(tmp_path, solver, capsys):
    model, task = solver
    run = Rounds(tmp_path, Settings.of(), resume=False)
    (tmp_path / "best").write_text("mine")
    with on_terminal():
        run.save(0, model, task, {"round": 0, "accuracy": 0.5})
    lines = f"{tmp_path}: round 0, accuracy 0.500", f"{tmp_path}/best: not linking to round-00: it exists and is not ours"
    assert capsys.readouterr().err.splitlines() == list(lines) and (tmp_path / "best").read_text() == "mine"


def test_long_sampling_is_logged(solver, capsys, monkeypatch):
    model, task = solver
    monkeypatch.setattr(metrics, "SECONDS", 0)
    with on_terminal():
        rollout(model, task, [[1, 2, 3]] * 5, max_new=2, batch_size=2)
    assert capsys.readouterr().err.splitlines() == [f"sampling: {n} of 5 completions" for n in (0, 2, 4)]
