"""``quietstar train`` from end to end: what it writes, how it continues, and how it ends."""

import json
import shlex
import shutil

import pytest

from quietstar.checkpoints import places
from quietstar.cli import errors
from quietstar.cli.options import parse
from quietstar.cli.train import Train
from quietstar.run import snapshots


def test_the_config_a_run_writes_makes_the_same_run(home, quietstar, trained):
    written = json.loads((home / "run" / "config.json").read_text())
    assert {"model", "data", "thoughts", "steps", "mixing"} <= set(written) and written["steps"] == 4
    assert "held out" in trained and "gain from thoughts" in trained and "step-000004" in trained
    code, _, err = quietstar("train", "--config", "run/config.json", "--out=again")
    assert code == 0, err
    again = json.loads((home / "again" / "config.json").read_text())
    assert again == {**written, "out": "again"}
    for name in ("model.safetensors", "quietstar.safetensors", "optimizer.safetensors"):
        first, second = (home / out / "checkpoints" / "step-000004" / name for out in ("run", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_resume(home, quietstar, trained):
    before = (home / "run" / "metrics.jsonl").read_text().splitlines()
    for path in places.every("run")[1:]:
        (path / "manifest.json").unlink()
    code, _, err = quietstar("train", "--config=run/config.json", "--resume")
    assert code == 0, err
    after = (home / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in after] == [json.loads(line)["loss"] for line in before]


def test_a_checkpoint_under_another_steps_name_is_passed_over_and_left(home, quietstar, trained):
    """Also where the run continues and removes what is older and later, and where others take the run's newest checkpoint."""
    folder, before = home / "run" / "checkpoints", (home / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "step-000004")
    for name in ("step-000001", "step-000099"):
        shutil.copytree(folder / "step-000002", folder / name)
        (folder / name / "notes.txt").write_text("mine")
    content = {path: path.read_bytes() for path in folder.glob("step-0000[09][19]/*")}
    passed_over = pytest.warns(UserWarning, match="^run/checkpoints/step-000099: passed over: its run.json says step 2$")
    with passed_over:
        code, _, err = quietstar("train", "--config=run/config.json", "--resume", "--keep=1")
    assert code == 0, err
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000004", "step-000099"]
    assert {path: path.read_bytes() for path in folder.glob("step-0000[09][19]/*")} == content and len(content) > 10
    losses = [[json.loads(line)["loss"] for line in x.splitlines()] for x in (before, (home / "run/metrics.jsonl").read_text())]
    assert losses[0] == losses[1]
    with passed_over:
        code, out, err = quietstar("eval", "--model=run")
    assert code == 0 and "wrote run/eval-step-000004.json" in out, err


def test_commands_can_be_pasted_where_the_folder_begins_with_a_dash(home, quietstar, train):
    code, out, err = train("--out=-x", "--steps=1", "--eval-every=0")
    assert code == 0, err
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  quietstar ")]
    assert [command[1:3] for command in commands] == [[name, "--model=-x"] for name in ("eval", "explain", "generate")]
    code, out, err = quietstar(*commands[-1][1:], "--max-new-tokens=1")
    assert code == 0 and out, err


BAD_INPUT = {
    "unknown model": (["--model=nobody/nothing"], "nobody/nothing"),
    "no tokenizer": (["--model=bare"], "cannot load a tokenizer"),
    "no such checkpoint": (["--resume=nowhere"], "no checkpoint at nowhere"),
    "a run is there": (["--out=run"], "resume continues it"),
    "another seed": (["--out=run", "--resume", "--seed=5"], "seed=0, not 5"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(home, tiny, train, request, case):
    arguments, message = BAD_INPUT[case]
    if "--out=run" in arguments:
        request.getfixturevalue("trained")
    tiny("llama").save_pretrained("bare")
    code, _, err = train(*arguments)
    assert code == errors.DATA and len(err) == 1 and err[0].startswith("quietstar: ") and message in err[0], err


@pytest.mark.long
def test_a_failure_in_the_middle_names_the_last_whole_checkpoint(home, train, monkeypatch):
    save, saved = snapshots.save_file, []

    def full(tensors, path, **options):
        saved.append(path)
        if len(saved) > 1:
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path, **options)

    monkeypatch.setattr(snapshots, "save_file", full)
    code, _, err = train("--out=run")
    assert code == errors.RUNTIME and "No space left on device" in err[-1]
    assert err[-1].endswith("the last whole checkpoint is run/checkpoints/step-000002")


def test_a_preset_sets_options_of_training_too():
    words = ["train", "--model=model", "--data=text.txt", "--preset=lora"]
    command = parse({"train": Train}, words)
    assert (command.thoughts.policy_weight, command.train.learning_rate, command.lora.lora_rank) == (10.0, 1e-4, 16)
    assert (command.thoughts.policy_temperature, command.thoughts.advantage) == (1.0, "leave_one_out")
    assert parse({"train": Train}, [*words, "--lora-rank=4"]).lora.lora_rank == 4


def test_the_help_of_a_preset_says_what_it_fills(capsys):
    with pytest.raises(SystemExit) as stop:
        parse({"train": Train}, ["train", "--preset=rlp", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.startswith("rlp fills, where nothing else is typed:\n  --thoughts=16\n")
    for option in ("--thought-start=<think>", "--ratio-clip-high=0.28", "--temperature=0.7", "--learning-rate=1e-06"):
        assert f"\n  {option}\n" in said
    words = ["train", "--model=model", "--data=text.txt", "--preset=rlp", "--thoughts=4", "--thought-start=", "--thought-end="]
    thoughts = parse({"train": Train}, words).thoughts
    assert (thoughts.thoughts, thoughts.thought_start, thoughts.policy_temperature) == (4, "", 0.7)


def test_a_finished_run_goes_on_for_more_steps(home, train):
    """Where no step depends on their number, as one that had this number from its start."""
    assert train("--out=whole", "--eval-every=0", "--steps=3")[0] == 0
    assert train("--out=run", "--eval-every=0", "--steps=2")[0] == 0
    code, _, err = train("--out=run", "--eval-every=0", "--steps=3", "--resume")
    assert code == 0, err
    weights = [(home / name / "checkpoints/step-000003/model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
