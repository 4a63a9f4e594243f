"""Which folders are a run's checkpoints, what the files of one may hold, and which lines of the metrics are read."""

import json
import os
import shutil

import pytest
import torch

import quietstar
from quietstar.checkpoints import places
from quietstar.checkpoints.places import checkpoint_of
from quietstar.config import TrainConfig
from quietstar.run import snapshots
from quietstar.run.metrics import Metrics
from quietstar.run.resume import find_checkpoint
from quietstar.training import train

CONFIG = quietstar.ThoughtConfig(thought_tokens=2, lookahead=2, policy_weight=3.0)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXTS = [{"input_ids": torch.arange(5) + i} for i in range(4)]


@pytest.fixture
def go(tiny, tmp_path):
    """``go(steps)`` trains in tmp_path / "run"."""

    def go(steps):
        torch.manual_seed(0)
        qs = quietstar.QuietStar(tiny("llama", **SMALL), CONFIG)
        config = TrainConfig(out=str(tmp_path / "run"), steps=steps, batch_size=2, warmup=0, save_every=1, keep=1, eval_every=0)
        return train(qs, TEXTS, config, progress=False)

    return go


def everything(folder):
    """The content of every file, and where links go."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_only_step_and_digits_are_ours(go, tmp_path):
    """Copies, notes and links beside the checkpoints are never removed, renamed or loaded."""
    go(2)
    checkpoints = tmp_path / "run" / "checkpoints"
    ours = checkpoints / "step-000002"
    for name in (
        "step-000002-best",
        "step-2",
        "step-0000009",
        "best",
        ".step-000001.mine",
        ".step-best",
        ".git",
        "step-٠٠٠٠٠٧",
    ):
        shutil.copytree(ours, checkpoints / name)
    (checkpoints / "step-notes.txt").write_text("mine")
    (checkpoints / ".step-000001").write_text("a file")
    (checkpoints / "step-000000").write_text("a file")
    (checkpoints / "step-000009").symlink_to("step-000002-best")
    before = everything(checkpoints)
    assert places.every(tmp_path / "run") == [ours]
    assert checkpoint_of(str(tmp_path / "run")) == str(ours)
    for name in (".step-000001-old", ".step-000003"):
        shutil.copytree(ours, checkpoints / name)
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=2, warmup=0)
    assert find_checkpoint("auto", config, CONFIG) == ours
    state = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    qs = quietstar.QuietStar.from_pretrained(ours)
    snapshots.save(tmp_path / "run", 3, qs, state, {"train": {}, "thoughts": {}}, keep=1)
    after = everything(checkpoints)
    mine = {path: content for path, content in before.items() if path.parts[0] != "step-000002"}
    assert {path: content for path, content in after.items() if path.parts[0] != "step-000003"} == mine
    assert places.every(tmp_path / "run") == [checkpoints / "step-000003"]


@pytest.mark.parametrize("says", ['{"step": 1}', None])
def test_a_folder_that_is_not_ours_where_a_step_will_be_saved(go, tmp_path, says):
    """It is neither taken for that step nor replaced: the run says so before its first step, or when it comes to save there."""
    other = tmp_path / "run" / "checkpoints" / "step-000002"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    if says:
        (other / "run.json").write_text(says)
    why = "its run.json says step 1" if says else "it has no run.json"
    with pytest.raises(ValueError, match=f"step-000002: {why}, and this run would overwrite it"):
        go(2)
    with pytest.raises(FileExistsError, match=why), places.new(other):
        pytest.fail("it is not made")
    assert (other / "notes.txt").read_text() == "mine" and not (other.parent / ".step-000002").exists()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-000002", "checkpoints/.step-000002", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_has_a_name_of_the_runs_is_refused_before_its_first_step(go, tmp_path, name, kind):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("/nope/nope")
    fits = (name, kind) in [("checkpoints", "folder"), ("checkpoints/.step-000002", "folder"), ("metrics.jsonl", "file")]
    if fits:
        go(2)
        return
    with pytest.raises((ValueError, OSError), match=name):
        go(2)
    assert path.is_symlink() or path.exists()
    assert not list(path.parent.rglob("run.json"))


@pytest.fixture
def saved(go, tmp_path):
    go(1)
    return places.folder(tmp_path / "run", 1)


def test_sizes_come_before_hashes_and_devices_are_not_read(saved):
    (saved / "README.md").unlink()
    (saved / "README.md").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="README.md: not a regular file"):
        places.check(saved)
    (saved / "README.md").unlink()
    with open(saved / "README.md", "wb") as file:
        file.truncate(2**43)
    with pytest.raises(ValueError, match="README.md is damaged: it has 8,796,093,022,208 bytes"):
        places.check(saved)


@pytest.mark.parametrize("name", ["/dev/zero", "../run.json"])
def test_a_manifest_names_files_of_its_own_folder(saved, name):
    (saved / "manifest.json").write_text(json.dumps({name: [0, "x"]}))
    with pytest.raises(ValueError, match=f"manifest.json must name files of its own folder, got '{name}'"):
        places.check(saved)


@pytest.mark.parametrize("line", ["null", '{"step": -1}', '{"step": 2', 10**5 * "["])
def test_a_line_of_the_metrics_that_is_none(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n" + '{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: line 2"):
        Metrics(path, 3, write=True)
    assert path.read_text().endswith(line + '\n{"step": 3}\n')


@pytest.mark.parametrize(("rest", "steps"), [("", [1, 2]), ('{"step": 3, "lo', [1, 2]), ('{"step": 3}', [1, 2, 3])])
def test_half_a_line_at_the_end_is_dropped(tmp_path, rest, steps):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2}\n' + rest)
    assert [line["step"] for line in Metrics(path, 3, write=True).lines] == steps
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps
