"""What commands take over from the run of a checkpoint: its data and what it held out, and how it thinks."""

import io
import json
import types

import pytest
import torch

from quietstar import QuietStar
from quietstar.checkpoints import native
from quietstar.cli import errors
from quietstar.data import sources


@pytest.fixture
def run(home, the_home):
    the_home.trained("--data=a.jsonl", "--length=24", "--held-out=5")
    return home / "run"


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


def test_eval_measures_what_the_run_held_out(home, run, quietstar):
    code, out, err = quietstar("eval", "--model=run")
    assert code == 0 and not err, err
    figures = report(home)
    assert figures["texts"] == 5 and figures["length"] == 24 and "5 texts held out" in out
    quietstar("eval", "--model=run")
    assert report(home) == figures and report(home, "run/eval-step-000004-2.json").keys() == figures.keys()


def test_steps_that_are_too_large_for_the_policy_weight_are_warned_about(train):
    with pytest.warns(UserWarning, match=r"policy_weight of 1e\+06 belongs to a learning rate of 1e-06: with 0.001"):
        train("--out=run", "--policy-weight=1e6", "--steps=1")


def test_eval_refuses_training_text_unless_all_is_said(home, run, quietstar):
    code, _, err = quietstar("eval", "--model=run", "--held-out=40")
    assert code == errors.DATA and err[-1].startswith("quietstar: run: 1 of the 6 texts held out here") and "--all" in err[-1]
    code, out, _ = quietstar("eval", "--model=run", "--all")
    assert code == 0 and report(home)["texts"] == 60 and "all 60 texts" in out


@pytest.mark.long
def test_a_checkpoint_that_says_nothing_is_evaluated_with_a_word(home, run, quietstar):
    qs = QuietStar.from_pretrained("run")
    qs.trained_on = ()
    qs.save_pretrained("bare")
    code, _, err = quietstar("eval", "--model=bare", "--data=a.jsonl", "--length=16")
    assert code == 0 and "doesn't say what it was trained on" in err[-1] and (home / "eval.json").exists()


@pytest.mark.long
def test_explain_and_export_take_the_runs_data(home, run, quietstar):
    code, out, err = quietstar("explain", "--model=run", "--held-out=2", "--out=page.html")
    assert code == 0 and "text 2 of the 5 that the run held out" in out, err
    assert (home / "page.html").exists()
    code, _, err = quietstar("explain", "--model=run", "--held-out=5")
    assert code == errors.DATA and "held out 5 texts" in err[-1]
    code, out, err = quietstar("export", "--model=run", "--out=thoughts.jsonl")
    assert code == 0, err
    metrics = [json.loads(line) for line in (home / "thoughts.jsonl").read_text().splitlines()]
    assert max(len(line["thought_ids"]) for line in metrics) == 24


def test_a_run_on_questions_as_chats(home, train, quietstar, chat_tokenizer):
    chat_tokenizer.save_pretrained("model")
    rows = [{"question": f"{i} and {i}?", "answer": 2 * i} for i in range(20)]
    (home / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = train("--data=sums.jsonl", "--chat", "--no-pack", "--length=32", "--steps=1", "--eval-every=0", "--out=run")
    assert code == 0, err
    code, _, err = quietstar("explain", "--model=run", "--out=page.json")
    assert code == 0, err
    text = "".join(x["text"] for x in report(home, "page.json")["tokens"])
    assert text.startswith("<end>[user]") and text.count("<end>") == 3


@pytest.mark.long
def test_explain_checks_what_was_held_out(home, run, quietstar):
    quietstar("train", "--model=run", "--data=text.txt", "--out=more", "--steps=1", "--batch-size=4", "--no-pack")
    texts = (home / "a.jsonl").read_text().splitlines()
    (home / "a.jsonl").write_text("\n".join(reversed(texts)))
    code, _, err = quietstar("explain", "--model=run", "--out=page.html")
    assert code == errors.DATA and "a.jsonl has changed since): give explain a text or --file" in err[-1]
    (home / "a.jsonl").unlink()
    code, _, err = quietstar("explain", "--model=more", "--out=page.html")
    assert code == 0 and err[-1].startswith("more: the texts of an earlier run can't be read, so they were not compared: ")


@pytest.mark.long
def test_training_goes_on_with_the_settings_of_the_checkpoint(home, run, quietstar):
    code, out, err = quietstar("train", "--model=run", "--out=more", "--steps=2", "--batch-size=4")
    assert code == 0, err
    before, after = QuietStar.from_pretrained("run"), QuietStar.from_pretrained("more")
    assert after.thought_config == before.thought_config and not torch.equal(after.start_embedding, before.start_embedding)
    assert [run.base for run in after.trained_on] == ["model", "run"]
    assert after.trained_on[1].data == after.trained_on[0].data
    code, out, err = quietstar("train", "--model=run", "--out=other", "--steps=1", "--policy-weight=5", "--batch-size=4")
    assert code == 0 and QuietStar.from_pretrained("other").thought_config.policy_weight == 5
    assert "not as in run: policy-weight 5.0 instead of 3.0" in out.splitlines() + err
    code, _, err = quietstar("train", "--model=run", "--out=third", "--steps=1", "--held-out-seed=3")
    assert code == errors.DATA and "among those that the model was trained on" in err[-1] and "--held-out=0" in err[-1]
    code, _, err = quietstar("train", "--model=run", "--out=fourth", "--steps=1", "--embedding-scale=100")
    assert code == errors.DATA and "embedding_scale=1.0, not 100.0" in err[-1]


@pytest.mark.long
def test_fast_takes_the_runs_data(home, run, quietstar):
    code, _, err = quietstar("fast", "--model=run", "--out=fast", "--held-out-seed=3")
    assert code == errors.DATA and "among those that the model was trained on" in err[-1]
    short = ["--curriculum=2-2", "--steps=1", "--plain-steps=1", "--batch-size=4"]
    code, out, err = quietstar("fast", "--model=run", "--out=fast", *short)
    assert code == 0 and "held-out loss without thoughts" in out, err


def test_a_run_does_not_continue_on_changed_texts(home, run, quietstar):
    with open(home / "a.jsonl", "a") as file:
        file.write('{"text": "One more line."}\n')
    code, _, err = quietstar("train", "--config=run/config.json", "--resume")
    assert code == errors.DATA and "has changed since the run began" in err[-1]


def test_a_run_from_standard_input_continues_on_the_same(home, train, quietstar, monkeypatch):
    content = "".join(f"{i} lines of text\n\n" for i in range(30))

    def piped(text):
        sources._stdin.cache_clear()
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False))

    piped(content)
    assert train("--data=-", "--steps=1", "--out=run")[0] == 0
    for text, expected in ((content, 0), (content + "more", errors.DATA)):
        piped(text)
        code, _, err = quietstar("train", "--config=run/config.json", "--resume")
        assert code == expected and (not code or "has changed since the run began" in err[-1]), err


def test_a_local_folder_that_is_missing_is_said_at_once(home, run, quietstar):
    (home / "runs").mkdir()
    for command in (["eval"], ["think", "text"], ["generate", "--prompt=text"], ["explain", "text"], ["train"], ["star"]):
        code, _, err = quietstar(*command, "--model=runs/nope", *(["--out=new"] if command[0] in ("train", "star") else []))
        assert code == errors.DATA and err == ["quietstar: runs/nope: there is no such folder"], command


def test_typed_options_win_and_what_differs_is_printed(home, run, quietstar):
    code, out, err = quietstar("eval", "--model=run", "--length=16")
    assert code == 0 and report(home)["length"] == 16
    assert "not as in run: length 16 instead of 24" in out.splitlines() + err


def test_a_run_does_not_continue_on_changed_thoughts_or_with_another_tokenizer(home, trained, train, quietstar):
    data = ("--data=text.txt", "--length=16", "--held-out=4")
    assert quietstar("export", "--model=run", "--out=thoughts.jsonl", *data)[0] == 0
    options = ("--out=on", "--thoughts-from=thoughts.jsonl", "--eval-every=0")
    code, _, err = train(*options, "--steps=2")
    assert code == 0, err
    assert train(*options, "--steps=2", "--resume")[0] == 0
    rows = [json.loads(line) for line in (home / "thoughts.jsonl").read_text().splitlines()]
    rows[0]["thought_ids"][0] = [[1 + x for x in thought] for thought in rows[0]["thought_ids"][0]]
    (home / "thoughts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = train(*options, "--steps=2", "--resume")
    assert code == errors.DATA and "thoughts.jsonl has changed since the run began" in err[-1]
    tokenizer = home / "model" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    tokenizer.write_text(json.dumps(content))
    code, _, err = train("--out=run", "--resume")
    assert code == errors.DATA and "the tokenizer of model has changed since the run began" in err[-1]
