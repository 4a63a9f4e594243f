"""``quietstar train`` from end to end: what it writes, how it continues, and how it ends."""

import json
import shlex
import signal

import pytest
import torch

from quietstar import QuietStar
from quietstar.cli import errors
from quietstar.cli import train as command
from quietstar.run import snapshots


def test_train(home, trained):
    assert "held out" in trained and "gain from thoughts" in trained and "step-000004" in trained
    metrics = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert QuietStar.from_pretrained("run/checkpoints/step-000004").thought_config.thought_tokens == 2


def test_where_to_think_and_how_to_learn_from_it_are_options(home, train):
    family = ["--anchors=gate", "--anchor-share=0.5", "--updates=2", "--ratio-clip=0.2", "--base-model=ema"]
    code, _, err = train("--out=first", *family)
    assert code == 0, err
    lines = [json.loads(line) for line in (home / "first" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["anchor_share"] < 1 for line in lines)
    code, _, err = train("--model=first", "--out=second", "--anchors=every")
    assert code == 0, err
    second = QuietStar.from_pretrained("second/checkpoints/step-000004")
    assert second.gate is None and second.base_model is not None and second.thought_config.anchors == "every"


def test_the_config_a_run_writes_makes_the_same_run(home, quietstar, trained):
    written = json.loads((home / "run" / "config.json").read_text())
    assert {"model", "data", "thoughts", "steps", "mixing"} <= set(written) and written["steps"] == 4
    code, _, err = quietstar("train", "--config", "run/config.json", "--out=again")
    assert code == 0, err
    again = json.loads((home / "again" / "config.json").read_text())
    assert again == {**written, "out": "again"}
    for name in ("model.safetensors", "quietstar.safetensors", "optimizer.safetensors"):
        first, second = (home / out / "checkpoints" / "step-000004" / name for out in ("run", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_yaml_and_typed_options_and_another_preset(home, quietstar, trained):
    options = json.loads((home / "run" / "config.json").read_text())
    (home / "mine.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    code, _, err = quietstar("train", "--config=mine.yaml", "--out=paper", "--preset=paper", "--steps=1", "--no-pack")
    assert code == 0, err
    written = json.loads((home / "paper" / "config.json").read_text())
    assert (written["mixing"], written["steps"], written["pack"]) == ("logprobs", 1, False)


def test_a_model_that_thinks_already_goes_on(home, quietstar, trained):
    code, _, err = quietstar("train", "--config=run/config.json", "--model=run", "--out=more", "--thoughts=3")
    assert code == 0, err
    before = QuietStar.from_pretrained("run/checkpoints/step-000004")
    after = QuietStar.from_pretrained("more/checkpoints/step-000004")
    assert after.thought_config.thoughts == 3
    assert 0 < (before.start_embedding - after.start_embedding).abs().max() < 0.01
    code, _, err = quietstar("train", "--config=run/config.json", "--model=run", "--out=other", "--embedding-scale=100")
    assert code == errors.DATA and "embedding_scale=1.0, not 100.0" in err[-1]


def test_gradient_checkpointing_changes_no_number(home, quietstar, trained):
    quietstar("train", "--config=run/config.json", "--out=less", "--gradient-checkpointing")
    losses = [
        [json.loads(line)["loss"] for line in (home / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("run", "less")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("how", [["--resume"], ["--resume", "auto"], ["--resume=run/checkpoints/step-000002"]])
def test_resume(home, quietstar, trained, how):
    before = (home / "run" / "metrics.jsonl").read_text().splitlines()
    for path in snapshots.every("run")[1:]:
        (path / "manifest.json").unlink()
    code, _, err = quietstar("train", "--config=run/config.json", *how)
    assert code == 0, err
    after = (home / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in after] == [json.loads(line)["loss"] for line in before]


BAD_INPUT = {
    "missing file": (["--data=no.txt"], "No such file"),
    "empty text": (["--data=empty.txt"], "no text in it"),
    "undecodable": (["--data=latin.txt"], "byte 3, in line 1, is not UTF-8"),
    "no field": (["--data=lines.jsonl", "--text-field=body"], "line 1 has no text in a field 'body'"),
    "too short": (["--data=short.txt"], "shorter than the look-ahead: it has 3 tokens, and looking 2 tokens ahead needs 4"),
    "length too short": (["--length=5", "--lookahead=8"], "J+2=10"),
    "unknown data": (["--data=nobody/nothing"], "nobody/nothing"),
    "unknown model": (["--model=nobody/nothing"], "nobody/nothing"),
    "empty model folder": (["--model=empty"], "empty"),
    "no tokenizer": (["--model=bare"], "cannot load a tokenizer"),
    "no such checkpoint": (["--resume=nowhere"], "no checkpoint at nowhere"),
    "a run is there": (["--out=run"], "resume continues it"),
    "another seed": (["--out=run", "--resume", "--seed=5"], "seed=0, not 5"),
    "another text": (["--out=run", "--resume", "--data=builtin"], "data='text.txt', not 'builtin'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(home, tiny, train, request, case):
    arguments, message = BAD_INPUT[case]
    if "--out=run" in arguments:
        request.getfixturevalue("trained")
    (home / "empty.txt").write_text("\n")
    (home / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (home / "lines.jsonl").write_text('{"text": "a"}\n')
    (home / "short.txt").write_text("ab")
    (home / "empty").mkdir()
    tiny("llama").save_pretrained("bare")
    code, _, err = train(*arguments)
    assert code == errors.DATA and len(err) == 1 and err[0].startswith("quietstar: ") and message in err[0], err


def test_a_damaged_model_is_named(home, train):
    weights = home / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = train()
    assert code == errors.DATA and len(err) == 1 and "model: model.safetensors is damaged" in err[0], err


@pytest.mark.parametrize(
    ("out", "code", "says"),
    [
        ("/proc/nowhere", errors.RUNTIME, "No such file or directory: /proc/nowhere"),
        ("text.txt/run", errors.USAGE, "--out must be a folder that can be written to, got text.txt/run"),
    ],
    ids=["unwritable", "under a file"],
)
def test_a_folder_that_cannot_be_written(train, out, code, says):
    got, _, err = train(f"--out={out}")
    assert got == code and len(err) == 1 and says in err[0], err


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


def test_a_loss_that_is_not_finite(home, train):
    code, _, err = train("--learning-rate=1e30", "--warmup=0", "--clip=0")
    assert code == errors.RUNTIME and "the loss is nan" in err[-1], err


def test_a_signal_says_how_to_go_on(home, quietstar, trained, monkeypatch):
    losses = [json.loads(line)["loss"] for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    count_targets = QuietStar.count_targets

    def terminated(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return count_targets(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QuietStar, "count_targets", terminated)
        code, _, err = quietstar("train", "--config=run/config.json", "--out=stopped")
    assert code == errors.SAVED and "stopped by a signal; saved stopped/checkpoints/step-000001" in err[-1]
    program, *again = shlex.split(err[-1].partition("continue with: ")[2])
    assert program == "quietstar" and quietstar(*again)[0] == 0
    metrics = [json.loads(line) for line in (home / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in metrics] == losses


def test_ctrl_c_before_anything_is_saved(train, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_data", interrupted)
    code, _, err = train()
    assert code == errors.STOPPED and len(err) == 1


def test_weights_stay_where_they_were(home, quietstar, trained):
    """The model that training began with is not written to."""
    assert sorted(path.name for path in (home / "model").iterdir() if path.suffix == ".safetensors") == ["model.safetensors"]
    assert torch.isfinite(QuietStar.from_pretrained("run/checkpoints/step-000004").start_embedding).all()
