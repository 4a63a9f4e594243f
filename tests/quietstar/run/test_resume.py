"""What may differ between a run and its continuation, and which checkpoint it continues from."""

import json
from dataclasses import dataclass, fields, replace

import pytest

from quietstar import ThoughtConfig
from quietstar.checkpoints import places
from quietstar.cli.train import Train
from quietstar.config import AdapterConfig, TrainConfig, option
from quietstar.data.texts import DataConfig
from quietstar.run.resume import Settings, find_checkpoint
from quietstar_recipes import fast, internalize, score, star, vstar
from quietstar_recipes.internalize import kd

# Fields that no number of a run depends on, for each config; all others must be the same.
FREE = {
    TrainConfig: {"out", "accumulation", "anchor_chunk", "fast_linear", "sharding", "rollout_weights", "eval_every"}
    | {"save_every", "keep", "tracker", "tracker_project", "tracker_name"},
    ThoughtConfig: set(),
    AdapterConfig: set(),
    DataConfig: set(),
    Train: {"allow_bin", "check_memory", "compile", "gradient_checkpointing", "config", "resume", "controls"},
    star.Config: {"out", "rounds", "batch_size"},
    vstar.Config: {"out", "rounds", "batch_size"},
    fast.Config: {"out", "save_every"},
    score.Config: {"out"},
    internalize.Config: {"out", "save_every"},
    kd.Config: set(),
}


@pytest.mark.parametrize("config", FREE, ids=lambda config: f"{config.__module__}.{config.__name__}")
def test_what_may_differ(config):
    assert {field.name for field in fields(config) if field.metadata.get("may_differ")} == FREE[config]


@dataclass
class Config:
    rate: float = option(0.1, "learning rate")
    parts: int = option(1, "parts", may_differ=True)
    thoughts: ThoughtConfig | None = None


def test_settings_are_those_that_must_be_the_same():
    settings = Settings.of(Config(0.5, 2, ThoughtConfig()), model="gpt2", sizes=(1, 2))
    assert settings.values == {"model": "gpt2", "sizes": [1, 2], "rate": 0.5}
    settings.check("run", {"model": "gpt2", "sizes": [1, 2], "rate": 0.5, "parts": 7})
    with pytest.raises(ValueError, match=r"^run: the run there has rate=0\.25, not 0\.5$"):
        settings.check("run", {"model": "gpt2", "sizes": [1, 2], "rate": 0.25})
    with pytest.raises(ValueError, match=r"^run: the run there has model=None, not 'gpt2'$"):
        settings.check("run", {"sizes": [1, 2], "rate": 0.5})


def checkpoint(out, step, train, thoughts):
    """A checkpoint's run.json, with a manifest of no files."""
    folder = places.folder(out, step)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"step": step, "config": {"train": train, "thoughts": thoughts}}))
    (folder / "manifest.json").write_text("{}")
    return folder


def test_the_newest_whole_checkpoint(tmp_path, capsys):
    config, thoughts = TrainConfig(out=str(tmp_path)), ThoughtConfig()
    assert find_checkpoint(None, config, thoughts) is find_checkpoint("auto", config, thoughts) is None
    whole, damaged = (checkpoint(tmp_path, step, vars(config), thoughts.to_dict()) for step in (2, 4))
    (damaged / "manifest.json").unlink()
    assert find_checkpoint("auto", config, thoughts) == whole
    assert "step-000004: manifest.json is missing or damaged" in capsys.readouterr().out
    with pytest.raises(ValueError, match="step-000004: manifest.json is missing or damaged"):
        find_checkpoint(damaged, config, thoughts)


def test_what_a_run_needs_to_continue(tmp_path):
    config, now = TrainConfig(out=str(tmp_path), steps=7), ThoughtConfig(thoughts=3, preset="paper", base_model="frozen")
    path = checkpoint(tmp_path, 2, vars(config) | {"out": "elsewhere"}, now.to_dict())
    assert find_checkpoint("auto", config, now) == path
    assert find_checkpoint("auto", replace(config, steps=8), now) == path
    with pytest.raises(ValueError, match="step-000002: the run there has steps=7, not 8: with schedule='linear', the learning"):
        find_checkpoint("auto", replace(config, steps=8, schedule="linear"), now)
    with pytest.raises(ValueError, match="step-000002: the run there is at step 2 already, after steps=1"):
        find_checkpoint("auto", replace(config, steps=1), now)
    with pytest.raises(ValueError, match="step-000002: the run there has schedule='constant', not 'linear'"):
        find_checkpoint("auto", replace(config, schedule="linear"), now)
    with pytest.raises(ValueError, match="step-000002: the run there has lookahead=4, not 3"):
        find_checkpoint("auto", config, replace(now, lookahead=3))
