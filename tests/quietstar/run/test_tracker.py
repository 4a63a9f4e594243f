"""A run's figures go to one of Accelerate's trackers too."""

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

    def run(tracker, **options):
        config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=2, tracker=tracker)
        return train(qs, data, config, progress=False, **options)

    return run


def test_each_step_is_logged(run):
    lines = run("list")
    assert LINES[0]["steps"] == 2
    assert LINES[1:] == [(line["step"], line["loss"]) for line in lines]


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(run, monkeypatch):
    begun = []

    class StandIn(ListTracker):
        name = "wandb"

        def __init__(self, run_name, **options):
            super().__init__(run_name)
            begun.append((run_name, options["id"], options["resume"], options["name"]))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", StandIn)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run("wandb")
    run("wandb", resume="auto")
    first, again = begun
    assert first == again == ("quietstar", first[1], "allow", "run") and len(first[1]) == 8
    for name, value in (("WANDB_PROJECT", "mine"), ("WANDB_NAME", "third"), ("WANDB_RUN_ID", "abc")):
        monkeypatch.setenv(name, value)
    run("wandb", resume="auto")
    assert begun[-1] == ("mine", "abc", "allow", "third")


def test_a_tracker_that_is_not_installed_is_refused(run, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="tracker='wandb', and its package isn't installed"):
        run("wandb")
