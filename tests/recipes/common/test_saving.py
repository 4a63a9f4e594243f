"""A run on disk is whole or refused by the name of its file, and what a continued run reads is what the stopped one wrote."""

import itertools
import json

import pytest
import torch

from quietstar.cli import main as cli
from quietstar.run.resume import Settings
from quietstar_recipes.common import saving
from quietstar_recipes.common.models import TaskConfig, make_task, small_model
from quietstar_recipes.common.saving import Progress, Rounds, hashes, load_model
from quietstar_recipes.common.training import adamw
from quietstar_recipes.tasks import Addition
from tests.quietstar.conftest import make_byte_tokenizer
from tests.recipes.conftest import same

SETTINGS = Settings({"recipe": "test"})
TASK = Addition(1)
DEEP = "[" * 100_000


def tiny(seed=0, width=8):
    return small_model(TASK, layers=1, width=width, heads=1, positions=32, seed=seed)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 4, dtype=torch.int64)).logits.square().sum().backward()
    optimizer.step()


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


def progress_in(folder, resume=True, settings=SETTINGS):
    return Progress(folder, settings, {"step": 0, "best": None}, resume)


@pytest.fixture
def trained(tmp_path):
    """A model and its optimizer after two saved steps."""
    model = tiny()
    run, optimizer = progress_in(tmp_path / "run"), adamw(model, 1e-3, 0.0)
    for number in (1, 2):
        step(model, optimizer)
        run.metrics.add({"step": number})
    run.state |= {"step": 2, "best": 0.5}
    run.save(model, optimizer)
    return model, optimizer


@pytest.fixture
def progress(trained, tmp_path):
    return tmp_path / "run/progress", lambda: progress_in(tmp_path / "run")


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


def test_weights_moments_and_state_come_back(trained, tmp_path):
    model, optimizer = trained
    again, run = tiny(1), progress_in(tmp_path / "run")
    other = adamw(again, 1e-3, 0.0)
    run.load(again, other)
    assert run.begun and run.state == {"step": 2, "best": 0.5} and [x["step"] for x in run.metrics.lines] == [1, 2]
    step(model, optimizer)
    step(again, other)
    assert same(model, again)


def test_a_run_of_other_settings_or_of_another_model_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="a run is there already"):
        progress_in(tmp_path / "run", resume=False)
    with pytest.raises(ValueError, match="the run there has recipe='test', not 'other'"):
        progress_in(tmp_path / "run", settings=Settings({"recipe": "other"}))
    with pytest.raises(ValueError, match="damaged or from another model"):
        progress_in(tmp_path / "run").load(tiny(width=16))


def test_a_save_that_fails_leaves_the_one_before(trained, progress, tmp_path, monkeypatch):
    def full(tensors, path):
        raise saving.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    _, resume = progress
    run = resume()
    run.state["step"] = 9
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: '.*/progress'$"):
        patch.setattr(saving, "save_file", full)
        run.save(tiny(3), trained[1])
    again, found = resume(), tiny(4)
    again.load(found)
    assert again.state["step"] == 2 and same(trained[0], found)
    assert sorted(x.name for x in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "progress"]


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
    for begin in (Rounds, progress_in):
        with pytest.raises(ValueError, match=f"{name}: it is (a link that leads to )?no folder, and this run would over"):
            begin(tmp_path / "run", settings=SETTINGS, resume=False)
    assert [x.name for x in path.parent.iterdir()] == [name]


KINDS = {
    "checkpoints": lambda out: cli.main(["train", "--model=none", f"--out={out}"]),
    "progress": progress_in,
    "recipe.json": lambda out: Rounds(out, SETTINGS, resume=True),
}


@pytest.mark.parametrize("mark, other", list(itertools.permutations(KINDS, 2)))
def test_a_run_of_another_command_is_left_alone(tmp_path, capsys, mark, other):
    (tmp_path / other).mkdir()
    (tmp_path / "metrics.jsonl").write_text("what was measured\n")
    sentence = f"{tmp_path}: a run of another command is there, with {other}: take another out"
    if mark == "checkpoints":
        assert KINDS[mark](tmp_path) == cli.DATA and capsys.readouterr().err == f"quietstar: {sentence}\n"
    else:
        with pytest.raises(ValueError) as error:
            KINDS[mark](tmp_path)
        assert str(error.value) == sentence
    assert (tmp_path / "metrics.jsonl").read_text() == "what was measured\n"


def test_a_run_that_failed_before_its_first_round_begins_anew(tmp_path):
    Rounds(tmp_path, Settings.of(recipe="star", shots=2), resume=False)
    Rounds(tmp_path, Settings.of(recipe="star", shots=1), resume=False)
    (tmp_path / "round-00").mkdir()
    with pytest.raises(ValueError, match="a run is there already"):
        Rounds(tmp_path, Settings.of(recipe="star", shots=1), resume=False)
    with pytest.raises(ValueError, match="the run there has shots=1, not 3"):
        Rounds(tmp_path, Settings.of(recipe="star", shots=3), resume=True)


def test_a_round_in_another_rounds_place_and_a_damaged_line_are_named(rounds):
    folder, resume = rounds
    for path in folder.glob("round-*/manifest.json"):
        path.unlink()
    (folder / "round-00/kept.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match="round-00/kept.jsonl: line 2 is not JSON"):
        resume().rows(0, "kept")
    (folder / "round-01").rename(folder / "round-02")
    (folder / "round-00").rename(folder / "round-01")
    (folder / "round-02").rename(folder / "round-00")
    with pytest.raises(ValueError, match="round-00/report.json: it is of round 1: move this folder, where round 0 belongs"):
        resume()


@pytest.mark.parametrize("content", ["", "[]", '{"round": ', DEEP])
@pytest.mark.parametrize("name", ["round-00/report.json", "recipe.json"])
def test_a_file_that_is_no_object_is_named(tmp_path, content, name):
    run = Rounds(tmp_path, SETTINGS, resume=False)
    run.folder(0).mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Rounds(tmp_path, SETTINGS, resume=True)
