"""A run's figures go to one of Accelerate's trackers too."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import TrainConfig
from quietstar.training import train

LINES = []


class ListTracker(tracking.GeneralTracker):
    name = "list"
    requires_logging_directory = False
    tracker = LINES

    def __init__(self, run_name, **options):
        super().__init__()

    def store_init_configuration(self, values):
        LINES.append(values)

    def log(self, values, step=None, **options):
        LINES.append((step, values["loss"]))


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "list", ListTracker)
    qs = QuietStar(tiny("llama"), ThoughtConfig(thoughts=1, thought_tokens=2, lookahead=2), verify=False)
    data = [{"input_ids": torch.arange(3, 10)}] * 4

    def run(tracker, resume=None, **options):
        config = TrainConfig(**{"out": str(tmp_path / "run"), "steps": 2, "batch_size": 2, "tracker": tracker} | options)
        return train(qs, data, config, progress=False, resume=resume)

    return run


def test_each_step_is_logged(run):
    lines = run("list")
    assert LINES[0]["steps"] == 2
    assert LINES[1:] == [(line["step"], line["loss"]) for line in lines]


@pytest.fixture
def begun(monkeypatch):
    """``begun(kind)``: the name and options of each run that a stand-in for this tracker begins, and the values it is given."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def begun(kind):
        runs, values = [], []

        class StandIn(ListTracker):
            name = kind

            def __init__(self, project, /, **options):
                super().__init__(project)
                runs.append((project, options))
                number = options.get("run_id") or f"made-{len(runs)}"  # of mlflow
                self.tracker = SimpleNamespace(info=SimpleNamespace(run_id=number))

            def store_init_configuration(self, config):
                values.append(config)

        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind, StandIn)
        monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(kind)])
        return runs, values

    return begun


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(run, begun, monkeypatch):
    runs, _ = begun("wandb")
    run("wandb")
    run("wandb", resume="auto")
    first, again = runs
    assert first == again == ("quietstar", {"id": first[1]["id"], "resume": "allow", "name": "run"})
    run("wandb")
    assert len({first[1]["id"], runs[-1][1]["id"], ""}) == 3  # a new run in the same folder
    for name, value in (("WANDB_PROJECT", "mine"), ("WANDB_NAME", "third"), ("WANDB_RUN_ID", "abc")):
        monkeypatch.setenv(name, value)
    run("wandb", resume="auto")
    assert runs[-1] == ("mine", {"id": "abc", "resume": "allow", "name": "third"})
    run("wandb", resume="auto", tracker_project="typed", tracker_name="fourth")
    assert runs[-1] == ("typed", {"id": "abc", "resume": "allow", "name": "fourth"})


def test_a_resumed_run_goes_on_in_the_same_run_of_other_trackers(run, begun):
    runs, _ = begun("trackio")
    run("trackio", tracker_project="mine", tracker_name="first")
    run("trackio", tracker_project="mine", tracker_name="first", resume="auto")
    assert runs[0] == runs[1] and runs[0][0] == "mine"
    assert re.fullmatch("first-[0-9a-f]{8}", runs[0][1]["name"]) and runs[0][1]["resume"] == "allow"

    runs, values = begun("mlflow")
    run("mlflow")
    for steps in (2, 3):  # it refuses another value of steps for the same run
        run("mlflow", resume="auto", steps=steps)
    again = ("quietstar", {"run_id": "made-1", "run_name": "run"})
    assert runs == [("quietstar", {"run_id": None, "run_name": "run"}), again, again] and len(values) == 1

    runs, _ = begun("tensorboard")
    run("tensorboard")
    run("tensorboard", resume="auto")
    assert runs == [("quietstar", {"purge_step": 1}), ("quietstar", {"purge_step": 3})]


@pytest.mark.parametrize("option", ["tracker_project", "tracker_name"])
def test_an_option_of_no_tracker_is_refused(run, option):
    with pytest.raises(ValueError, match=f"^train: {option} needs a tracker, got 'mine' alone$"):
        run("", **{option: "mine"})


def test_a_tracker_that_is_not_installed_is_refused(run, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="tracker='wandb', and its package isn't installed"):
        run("wandb")
