"""What commands take over from the run of a checkpoint: its data and what it held out, and how it thinks."""

import json

import pytest

from quietstar import QuietStar
from quietstar.checkpoints import native
from quietstar.cli import errors


@pytest.fixture
def lines(home):
    rows = [{"text": f"Line {i} of the file has words of its own, {i * i} of them."} for i in range(60)]
    (home / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture
def run(lines, train):
    code, out, err = train("--data=a.jsonl", "--out=run", "--length=24", "--held-out=5")
    assert code == 0, err
    return lines / "run"


def report(home, name="run/eval-step-000004.json"):
    return json.loads((home / name).read_text())


def test_a_run_describes_itself(run):
    thoughts, (trained_on,) = native.read_description(run)
    assert native.read_description("model") is None
    assert thoughts.policy_weight == 3 and trained_on.base == "model"
    data = {"data": str(run.parent / "a.jsonl"), "length": 24, "held_out": 5, "pack": True}
    assert data.items() <= trained_on.data.items()
    assert (trained_on.texts, trained_on.held_out) == (60, 5)
    qs = QuietStar.from_pretrained("run")
    assert qs.trained_on == (trained_on,)
    qs.save_pretrained("copy")
    assert QuietStar.from_pretrained("copy").trained_on == (trained_on,)


@pytest.mark.parametrize("how", [[], ["--data=a.jsonl"]], ids=["nothing typed", "the data typed"])
def test_eval_measures_what_the_run_held_out(lines, run, quietstar, how):
    code, out, err = quietstar("eval", "--model=run", *how)
    assert code == 0 and not err, err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    figures = report(lines)
    for name in ("base", "mixed", "gain", "texts", "tokens"):
        assert figures[name] == pytest.approx(last[f"eval_{name}"], abs=1e-6)
    assert figures["texts"] == 5 and figures["length"] == 24 and "5 texts held out" in out


def test_eval_from_another_folder(lines, run, quietstar, monkeypatch):
    (lines / "elsewhere").mkdir()
    monkeypatch.chdir(lines / "elsewhere")
    code, _, err = quietstar("eval", "--model=../run")
    assert code == 0 and report(lines)["texts"] == 5, err


def test_eval_refuses_training_text_unless_all_is_said(lines, run, quietstar):
    code, _, err = quietstar("eval", "--model=run", "--held-out=40")
    assert code == errors.DATA and err[-1].startswith("quietstar: run: 1 of the 6 texts held out here") and "--all" in err[-1]
    code, out, _ = quietstar("eval", "--model=run", "--all")
    assert code == 0 and report(lines)["texts"] == 60 and "all 60 texts" in out


def test_typed_options_win_and_what_differs_is_printed(lines, run, quietstar):
    code, out, err = quietstar("eval", "--model=run", "--length=16")
    assert code == 0 and report(lines)["length"] == 16
    assert "not as in run: length 16 instead of 24" in out.splitlines() + err


def test_eval_says_what_it_wrote_and_overwrites_nothing(lines, run, quietstar):
    pytest.importorskip("matplotlib")
    for name in ("run/eval-step-000004.json", "run/eval-step-000004-2.json"):
        _, out, _ = quietstar("eval", "--model=run")
        assert f"wrote {name}" in out and (lines / name).exists() and (lines / name).with_suffix(".png").exists()
    assert not list(lines.glob("eval*"))


def test_a_checkpoint_that_says_nothing_is_evaluated_with_a_word(lines, run, quietstar):
    qs = QuietStar.from_pretrained("run")
    qs.trained_on = ()
    qs.save_pretrained("bare")
    code, _, err = quietstar("eval", "--model=bare", "--data=a.jsonl", "--length=16")
    assert code == 0 and "doesn't say what it was trained on" in err[-1] and (lines / "eval.json").exists()


def test_explain_and_export_take_the_runs_data(lines, run, quietstar):
    code, out, err = quietstar("explain", "--model=run", "--held-out=2", "--out=page.html")
    assert code == 0 and "text 2 of the 5 that the run held out" in out, err
    assert (lines / "page.html").exists()
    code, _, err = quietstar("explain", "--model=run", "--held-out=5")
    assert code == errors.DATA and "held out 5 texts" in err[-1]
    code, out, err = quietstar("export", "--model=run", "--out=thoughts.jsonl")
    assert code == 0, err
    metrics = [json.loads(line) for line in (lines / "thoughts.jsonl").read_text().splitlines()]
    assert max(len(line["thought_ids"]) for line in metrics) == 24


def test_explain_checks_what_was_held_out(lines, run, quietstar):
    quietstar("train", "--model=run", "--data=text.txt", "--out=more", "--steps=1", "--batch-size=4", "--no-pack")
    texts = (lines / "a.jsonl").read_text().splitlines()
    (lines / "a.jsonl").write_text("\n".join(reversed(texts)))
    code, _, err = quietstar("explain", "--model=run", "--out=page.html")
    assert code == errors.DATA and "a.jsonl has changed since): give explain a text or --file" in err[-1]
    (lines / "a.jsonl").unlink()
    code, _, err = quietstar("explain", "--model=more", "--out=page.html")
    assert code == 0 and err[-1].startswith("more: the texts of an earlier run can't be read, so they were not compared: ")


def test_training_goes_on_with_the_settings_of_the_checkpoint(lines, run, quietstar):
    code, out, err = quietstar("train", "--model=run", "--out=more", "--steps=2", "--batch-size=4")
    assert code == 0, err
    before, after = QuietStar.from_pretrained("run"), QuietStar.from_pretrained("more")
    assert after.thought_config == before.thought_config
    assert [run.base for run in after.trained_on] == ["model", "run"]
    assert after.trained_on[1].data == after.trained_on[0].data
    code, out, err = quietstar("train", "--model=run", "--out=other", "--steps=1", "--policy-weight=5", "--batch-size=4")
    assert code == 0 and QuietStar.from_pretrained("other").thought_config.policy_weight == 5
    assert "not as in run: policy-weight 5.0 instead of 3.0" in out.splitlines() + err
    code, _, err = quietstar("train", "--model=run", "--out=third", "--steps=1", "--held-out-seed=3")
    assert code == errors.DATA and "among those that the model was trained on" in err[-1] and "--held-out=0" in err[-1]


def test_fast_takes_the_runs_data(lines, run, quietstar):
    code, _, err = quietstar("fast", "--model=run", "--out=fast", "--held-out-seed=3")
    assert code == errors.DATA and "among those that the model was trained on" in err[-1]
    short = ["--curriculum=2-2", "--steps=1", "--plain-steps=1", "--batch-size=4"]
    code, out, err = quietstar("fast", "--model=run", "--out=fast", *short)
    assert code == 0 and "held-out loss without thoughts" in out, err


def test_a_run_does_not_continue_on_changed_texts(lines, run, quietstar):
    with open(lines / "a.jsonl", "a") as file:
        file.write('{"text": "One more line."}\n')
    code, _, err = quietstar("train", "--config=run/config.json", "--resume")
    assert code == errors.DATA and "has changed since the run began" in err[-1]


def test_a_text_file_without_paragraphs_is_evaluated(home, train, quietstar):
    (home / "book.txt").write_text(" ".join(f"word {i}" for i in range(400)))
    code, out, err = train("--data=book.txt", "--out=book")
    assert code == 0 and "gain from thoughts" in out, err
    assert quietstar("eval", "--model=book")[0] == 0
    code, out, err = quietstar("eval", "--model=book", "--all")
    assert code == 0 and report(home, "book/eval-step-000004-2.json")["texts"] > 100, err


def test_a_local_folder_that_is_missing_is_said_at_once(lines, run, quietstar):
    (lines / "runs").mkdir()
    for command in (["eval"], ["think", "text"], ["generate", "--prompt=text"], ["explain", "text"], ["train"], ["star"]):
        code, _, err = quietstar(*command, "--model=runs/nope", *(["--out=new"] if command[0] in ("train", "star") else []))
        assert code == errors.DATA and err == ["quietstar: runs/nope: there is no such folder"], command


def test_the_preset_for_small_models_comes_with_a_learning_rate(home, quietstar):
    code, _, err = quietstar(
        "train", "--model=model", "--data=text.txt", "--preset=small", "--steps=1", "--length=16", "--out=run"
    )
    assert code == 0, err
    config = json.loads((home / "run" / "config.json").read_text())
    assert (config["learning_rate"], config["policy_weight"], config["embedding_scale"]) == (1e-3, 10, 1)


def test_steps_that_are_too_large_for_the_policy_weight_are_warned_about(train):
    with pytest.warns(UserWarning, match=r"policy_weight of 1e\+06 belongs to a learning rate of 1e-06: with 0.001"):
        train("--out=run", "--policy-weight=1e6", "--steps=1")
    code, _, err = train("--out=other", "--policy-weight=1e6", "--learning-rate=1e-6", "--steps=1")
    assert code == 0, err
