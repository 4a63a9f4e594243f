"""A recipe's state on disk is whole or refused, and a resumed run gives the same numbers."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from quietstar.config import option
from quietstar.run.resume import Settings
from quietstar_recipes.common import saving as recipe
from quietstar_recipes.common.saving import Progress
from tests.recipes.conftest import same


@dataclass
class Config:
    rate: float = option(0.1, "learning rate")
    save_every: int = option(5, "updates between checkpoints", may_differ=True)


def model(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def step(module, optimizer):
    optimizer.zero_grad()
    module(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def begin(tmp_path, resume=False, **settings):
    return Progress(tmp_path, Settings.of(Config(**settings)), {"step": 0, "best": None}, resume)


@pytest.fixture
def saved(tmp_path):
    """Two steps, saved; the module and its optimizer."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    run = begin(tmp_path)
    for _ in range(2):
        step(module, optimizer)
        run.state["step"] += 1
        run.metrics.add({"step": run.state["step"]})
    run.state["best"] = 0.5
    run.save(module, optimizer)
    return module, optimizer


def test_weights_moments_and_state_come_back(saved, tmp_path):
    module, optimizer = saved
    again = model(1)
    other = torch.optim.AdamW(again.parameters())
    run = begin(tmp_path, resume=True)
    run.load(again, other)
    assert run.begun and run.state == {"step": 2, "best": 0.5} and [x["step"] for x in run.metrics.lines] == [1, 2]
    step(module, optimizer)
    step(again, other)
    assert same(module, again)


def test_a_run_of_other_settings_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="a run is there already"):
        begin(tmp_path)
    with pytest.raises(ValueError, match="the run there has rate=0.1, not 0.2"):
        begin(tmp_path, resume=True, rate=0.2)
    begin(tmp_path, resume=True, save_every=7)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named(saved, tmp_path, file):
    path = tmp_path / "progress" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="progress: .*damaged|state.json is not JSON"):
        begin(tmp_path, resume=True).load(model(), None)


STATE = json.dumps({"settings": Settings.of(Config()).values, "state": {"step": "STEP"}})


@pytest.mark.parametrize(
    "content, message",
    [
        *((x, "state.json") for x in ("[]", "null", "[" * 100_000, '{"settings": [], "state": {}}')),
        *((STATE.replace('"STEP"', x), r"state.json: state: .* \$.step") for x in ("-1", "null", "1.5", '"x"')),
    ],
)
def test_a_state_that_no_run_can_have_is_named(saved, tmp_path, content, message):
    (tmp_path / "progress" / "state.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        begin(tmp_path, resume=True)


def test_weights_of_another_model_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="damaged or from another model"):
        begin(tmp_path, resume=True).load(model(width=5))


def test_a_save_that_fails_leaves_the_one_before(saved, tmp_path, monkeypatch):
    module, optimizer = saved

    def full(tensors, path):
        raise recipe.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    run = begin(tmp_path, resume=True)
    run.state["step"] = 9
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: '.*/progress'$"):
        patch.setattr(recipe, "save_file", full)
        run.save(model(3), optimizer)
    again = begin(tmp_path, resume=True)
    found = model(4)
    again.load(found)
    assert again.state["step"] == 2
    assert same(module, found)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["metrics.jsonl", "progress"]
