"""What a recipe starts with: a model in the requested dtype, and a folder that no other run uses."""

import itertools
import json

import pytest
import torch

from quietstar.cli import main as cli
from quietstar.run.resume import Settings
from quietstar_recipes.common.models import TaskConfig, load, make_task
from quietstar_recipes.common.saving import Progress, Rounds

ADDITION = TaskConfig(task="addition", digits=1)


def test_weights_are_loaded_in_single_precision_unless_asked_otherwise(solver, tmp_path):
    _, task = solver
    halved, path = load("", ADDITION)[0].bfloat16(), tmp_path / "model"
    halved.save_pretrained(path)
    task.tokenizer.save_pretrained(path)
    assert load(str(path), ADDITION)[0].dtype == torch.float32
    assert load(str(path), ADDITION, "bfloat16")[0].dtype == load("", ADDITION, "bfloat16")[0].dtype == torch.bfloat16


def test_a_task_has_the_digits_that_were_asked_for():
    configs = {"digits": 3, "other_digits": 2}, {"digits": 4}, {"task": "sums", "digits": 4}, {"task": "addition", "digits": 3}
    names = ["3 x 2-digit multiplication", "4-digit multiplication", "sums of 4 digits", "3-digit addition"]
    assert [make_task(TaskConfig(**config)).name for config in configs] == names
    with pytest.raises(ValueError, match="TaskConfig: digits must be from 2 to 18, got 1"):
        TaskConfig(task="sums", digits=1)


KINDS = {
    "checkpoints": lambda out: cli.main(["train", "--model=none", f"--out={out}"]),
    "progress": lambda out: Progress(out, Settings.of(), {"step": 0}, resume=True),
    "recipe.json": lambda out: Rounds(out, Settings.of(), resume=True),
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


DEEP = "[" * 100_000


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    run = Rounds(tmp_path, Settings.of(recipe="star"), resume=False)
    run.folder(0).mkdir()
    (run.folder(0) / "report.json").write_text('{"round": ')
    (run.folder(0) / "kept.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match="round-00/report.json is not JSON"):
        run.report(0)
    with pytest.raises(ValueError, match="round-00/kept.jsonl: line 2 is not JSON"):
        run.rows(0, "kept")
    (tmp_path / "recipe.json").write_text("")
    with pytest.raises(ValueError, match="recipe.json is not JSON"):
        Rounds(tmp_path, Settings.of(recipe="star"), resume=True)


def test_a_round_copied_to_another_rounds_place_is_named(tmp_path):
    settings = Settings.of(recipe="star")
    run = Rounds(tmp_path, settings, resume=False)
    for number, name in ((0, 0), (1, 1), (1, 2)):
        run.folder(name).mkdir()
        (run.folder(name) / "report.json").write_text(json.dumps({"round": number, "accuracy": 0.5}))
    with pytest.raises(ValueError, match="round-02/report.json: it is of round 1: move this folder, where round 2 belongs"):
        Rounds(tmp_path, settings, resume=True)
    run.folder(2).rename(tmp_path / "copy")
    assert Rounds(tmp_path, settings, resume=True).done == 1


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"round": 0}', '{"round": -1, "accuracy": 0.5}', DEEP, '{"round": 0, "accuracy": "x"}']
)
def test_a_report_of_another_form_is_named(tmp_path, content):
    run = Rounds(tmp_path, Settings.of(recipe="star"), resume=False)
    run.folder(0).mkdir()
    (run.folder(0) / "report.json").write_text(content)
    with pytest.raises(ValueError, match="round-00/report.json"):
        run.log("star", 1)
    if not content.startswith("{"):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(ValueError, match="recipe.json"):
            Rounds(tmp_path, Settings.of(recipe="star"), resume=True)
