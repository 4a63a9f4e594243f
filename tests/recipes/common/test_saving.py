"""What a continued run reads is what the stopped one wrote and read: anything else is refused by its name."""

import json

import pytest
import torch

from quietstar.run.resume import Settings
from quietstar_recipes.common.models import TaskConfig, make_task, small_model
from quietstar_recipes.common.saving import Progress, Rounds, hashes, load_model
from quietstar_recipes.common.training import adamw
from quietstar_recipes.tasks import Addition
from tests.quietstar.conftest import make_byte_tokenizer

SETTINGS = Settings({"recipe": "test"})
TASK = Addition(1)


def tiny(seed=0):
    return small_model(TASK, layers=1, width=8, heads=1, positions=32, seed=seed)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << int(place * 7)
    path.write_bytes(content)


@pytest.fixture
def rounds(tmp_path):
    """A run of two rounds: its folder and the function that continues it."""

    def resume():
        return Rounds(tmp_path / "run", SETTINGS, resume=True)

    for number in range(2):
        report = {"round": number, "accuracy": 0.5, "valid_accuracy": 0.5}
        resume().save(number, tiny(), TASK, report, kept=[{"prompt": "1+1="}])
    return tmp_path / "run", resume


@pytest.fixture
def progress(tmp_path):
    def resume():
        return Progress(tmp_path / "run", SETTINGS, {"step": 0}, resume=True)

    model = tiny()
    optimizer = adamw(model, 1e-3, 0.0)
    model(torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    resume().save(model, optimizer)
    return tmp_path / "run/progress", resume


@pytest.mark.parametrize("kind", ["rounds", "progress"])
@pytest.mark.parametrize("place", [0.01, 0.5, 0.999])
def test_a_flipped_bit_is_refused_by_the_files_name(request, kind, place):
    folder, resume = request.getfixturevalue(kind)
    resume()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "best" not in path.parts)
    files = [path for path in files if path.name != "recipe.json"]
    assert len(files) >= 4
    for path in files:
        whole = path.read_bytes()
        flip(path, place)
        with pytest.raises(ValueError, match="round-0|progress" if path.name == "manifest.json" else path.name):
            resume()
        if path.suffix == ".safetensors" and kind == "rounds":
            with pytest.raises(ValueError, match="damaged"):
                load_model(path.parent, tiny())
        path.write_bytes(whole)
    (files[0].parent / "notes.txt").write_text("of the user's")
    resume()


def test_a_run_of_an_older_version_continues(rounds):
    folder, resume = rounds
    for path in folder.glob("round-*/manifest.json"):
        path.unlink()
    assert resume().done == 1


def test_other_inputs_are_refused_by_name(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"{i} and {i}?", "answer": f"It is {2 * i}\n#### {2 * i}"} for i in range(40)]

    def settings(model):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = make_task(TaskConfig("gsm8k", data=str(file)), make_byte_tokenizer())
        return Settings.of(recipe="test", inputs=hashes(task, model, "base"))

    saved = settings(tiny()).values
    settings(tiny()).check("run", saved)
    settings(tiny()).check("run", {"recipe": "test"})  # saved by an older version
    with pytest.raises(ValueError, match="run: the model base has changed since the run began"):
        settings(tiny(1)).check("run", saved)
    rows.pop()
    with pytest.raises(ValueError, match=f"run: the file {file} has changed since the run began"):
        settings(tiny()).check("run", saved)


@pytest.mark.parametrize("name", ["round-02", "verifier", "progress"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_has_the_name_of_a_folder_to_come_is_refused_before_the_run(tmp_path, name, kind):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    path.write_text("mine") if kind == "file" else path.symlink_to("/nope")
    for begin in (
        lambda: Rounds(tmp_path / "run", SETTINGS, resume=False),
        lambda: Progress(tmp_path / "run", SETTINGS, {"step": 0}, resume=False),
    ):
        with pytest.raises(ValueError, match=f"{name}: it is (a link that leads to )?no folder, and this run would over"):
            begin()
    assert [x.name for x in path.parent.iterdir()] == [name]
