"""The command line from end to end on a tiny model: what it writes, what it prints, and how it ends."""

import json
import shlex
import signal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli import main as cli
from quietstar.config import TrainConfig
from quietstar.data.texts import DataConfig
from quietstar.run import snapshots

SMALL = ["--length=16", "--steps=4", "--batch-size=4", "--thoughts=2", "--thought-tokens=2", "--lookahead=2", "--held-out=4"]
SMALL += ["--save-every=2", "--eval-every=2", "--learning-rate=1e-3", "--policy-weight=3", "--embedding-scale=1"]


def byte_tokenizer():
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


@pytest.fixture
def home(tiny, tmp_path, monkeypatch):
    """An empty folder with a model and a text in it, where the commands run."""
    monkeypatch.chdir(tmp_path)
    tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(40)))
    return tmp_path


@pytest.fixture
def quietstar(home, capsys):
    """``quietstar("train", ...)``: exit code, what was printed, and the lines on stderr that are not a progress bar."""

    def run(*arguments):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        lines = err.replace("\r", "\n").splitlines()  # a bar's return leaves an empty one
        return code, out, [line for line in lines if line and "it/s" not in line and "step/s" not in line]

    return run


@pytest.fixture
def trained(quietstar):
    code, out, err = quietstar("train", "--model=model", "--data=text.txt", "--out=run", *SMALL)
    assert code == 0, err
    return out


def test_where_to_think_and_how_to_learn_from_it_are_options(home, quietstar):
    family = ["--anchors=gate", "--anchor-share=0.5", "--updates=2", "--ratio-clip=0.2", "--base-model=ema"]
    code, _, err = quietstar("train", "--model=model", "--data=text.txt", "--out=first", *SMALL, *family)
    assert code == 0, err
    lines = [json.loads(line) for line in (home / "first" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["anchor_share"] < 1 for line in lines)
    code, _, err = quietstar("train", "--model=first", "--data=text.txt", "--out=second", *SMALL, "--anchors=every")
    assert code == 0, err
    second = QuietStar.from_pretrained("second/checkpoints/step-000004")
    assert second.gate is None and second.base_model is None and second.thought_config.anchors == "every"


def test_train_think_eval(home, quietstar, trained):
    assert "held out" in trained and "gain from thoughts" in trained and "step-000004" in trained
    metrics = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert QuietStar.from_pretrained("run/checkpoints/step-000004").thought_config.thought_tokens == 2

    code, out, _ = quietstar("think", "--model=run", "Hello", "--at", "-1", "0")
    lines = out.splitlines()
    assert code == 0 and [line.split()[:2] for line in lines] == [["0", "'H'"], ["4", "'o'"]] and "|" not in out
    code, out, _ = quietstar("think", "--model=run/checkpoints/step-000004", "Hello", "--seed=3")
    assert code == 0 and len(out.splitlines()) == 5 and all(line.count("  |  ") == 1 for line in out.splitlines())
    assert quietstar("think", "--model=run", "Hello", "--seed=3")[1] == out

    code, out, _ = quietstar("eval", "--model=run", "--data=text.txt", "--length=16", "--held-out=4", "--out=eval.json")
    figures = json.loads((home / "eval.json").read_text())
    assert code == 0 and f"{figures['base']:.4f}" in out
    everywhere = figures["by_anchor_choice"][0]
    assert everywhere["tokens"] == figures["tokens"] and f"{everywhere['gain_of_all']:+.4f}" in out
    assert {name: metrics[-1][f"eval_{name}"] for name in ("base", "mixed", "gain")} == pytest.approx(
        {name: figures[name] for name in ("base", "mixed", "gain")}, abs=1e-6
    )
    quietstar("eval", "--model=run", "--data=text.txt", "--length=16", "--all")
    assert json.loads((home / "eval.json").read_text())["texts"] == 40


def test_generate(home, quietstar):
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained("model")
    qs = QuietStar(model, ThoughtConfig(thought_tokens=2, lookahead=2), tokenizer, verify=False)
    torch.nn.init.normal_(qs.mixing_head[4].weight, 0, 0.5, generator=torch.Generator().manual_seed(1))
    qs.save_pretrained("thinks")
    ids = tokenizer("Hello you", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": 0}

    code, out, err = quietstar("generate", "--model=thinks", "--prompt=Hello you", "--max-new-tokens=6")
    thoughts = []
    tokens = qs.generate(ids, on_thoughts=thoughts.append, **options)[0, 9:]
    assert code == 0 and not any(err) and out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    out = quietstar("generate", "--model=thinks", "--prompt=Hello you", "--max-new-tokens=6", "--think=never")[1]
    plain = qs.generate(ids, think="never", **options)[0, 9:]
    assert out == tokenizer.decode(plain, skip_special_tokens=True) + "\n" and not torch.equal(plain, tokens)

    shown = ("generate", "--model=thinks", "--prompt=Hello you", "--max-new-tokens=6", "--show-thoughts")
    lines = quietstar(*shown)[1].splitlines()
    assert [line[18:] for line in lines] == [repr(tokenizer.decode(each[0, 0])) for each in thoughts]
    assert quietstar(*shown, "--think=never")[1].count("  ") == 0
    sampled = (*shown, "--sample-thoughts", "--thoughts=2", "--temperature=1", "--top-k=9", "--top-p=0.9", "--seed=3")
    lines = quietstar(*sampled)[1].splitlines()
    assert {line.count("  |  ") for line in lines} == {1} and quietstar(*sampled)[1].splitlines() == lines

    for option in ("--think=often", "--think=-1", "--think=nan", "--temperature=-1"):
        code, out, err = quietstar("generate", "--model=thinks", "--prompt=Hello", option)
        assert code == cli.USAGE and "must be" in err[-1] and option.partition("=")[2] in err[-1]
    for options in (("--prompt=",), ("--prompt=a", "--thoughts=0"), ("--prompt=a", "--max-new-tokens=0")):
        code, out, err = quietstar("generate", "--model=thinks", *options)
        assert code == cli.DATA and len(err) == 1
    code, out, _ = quietstar("generate", "--help")
    assert code == 0 and "--show-thoughts" in out and "nats" in out


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
    assert code == cli.DATA and "embedding_scale=1.0, not 100.0" in err[-1]


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


def test_doctor(quietstar):
    code, out, _ = quietstar("doctor")
    assert code == 0 and "transformers" in out and "thought_attention" in out
    code, out, _ = quietstar("doctor", "--model=model", "--batch-size=2", "--length=64", "--thoughts=3", "--verify")
    assert code == 0 and "2 x 64 tokens, 5,504 rows" in out and "optimizer moments" in out and "ok" in out.splitlines()[-1]


@pytest.mark.parametrize("command", ["train", "think", "eval", "doctor"])
def test_help(quietstar, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = quietstar(command, "--help")
    assert code == 0
    if command == "train":
        flat = " ".join(out.replace("│", " ").split())
        for config in (DataConfig, ThoughtConfig, TrainConfig):
            for name, field in config.__dataclass_fields__.items():
                assert f"--{name.replace('_', '-')}" in flat
                default = field.default if field.default != "" else "''"
                assert f"{field.metadata['help']} (default: {default})" in flat, name
        assert "(required)" in flat


def test_no_command_is_a_usage_error(quietstar):
    code, _, err = quietstar()
    assert code == cli.USAGE and err


USAGE_ERRORS = {
    "unknown command": ["paint"],
    "unknown option": ["train", "--model=model", "--stpes=3"],
    "not a number": ["train", "--model=model", "--steps=many"],
    "no model": ["train"],
    "outside its range": ["train", "--model=model", "--steps=0"],
    "a preset that is none": ["train", "--model=model", "--preset=mine"],
    "a length outside its range": ["train", "--model=model", "--length=1"],
    "no such config": ["train", "--config=nowhere.json"],
    "an option of no command in a config": ["train", "--config=odd.json"],
    "a config that is a list": ["train", "--config=list.json"],
    "a config that is no yaml": ["train", "--config=broken.yaml"],
}


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_errors(home, quietstar, case):
    (home / "odd.json").write_text('{"model": "model", "colour": "red"}')
    (home / "list.json").write_text("[1, 2]")
    (home / "broken.yaml").write_text("a: [")
    code, _, err = quietstar(*USAGE_ERRORS[case])
    assert code == cli.USAGE and err and not any("Traceback" in line for line in err)


BAD_INPUT = {
    "missing file": (["--data=no.txt"], "No such file"),
    "empty text": (["--data=empty.txt"], "no text in it"),
    "undecodable": (["--data=latin.txt"], "byte 3, in line 1, is not UTF-8"),
    "no field": (["--data=lines.jsonl", "--text-field=body"], "line 1 has no text in a field 'body'"),
    "too short": (["--data=short.txt"], "shorter than the look-ahead"),
    "length too short": (["--length=5", "--lookahead=8"], "J+2=10"),
    "unknown data": (["--data=nobody/nothing"], "nobody/nothing"),
    "unknown model": (["--model=nobody/nothing"], "nobody/nothing"),
    "empty model folder": (["--model=empty"], "empty"),
    "no tokenizer": (["--model=bare"], "no tokenizer"),
    "no such checkpoint": (["--resume=nowhere"], "no checkpoint at nowhere"),
    "a run is there": (["--out=run"], "resume continues it"),
    "another seed": (["--out=run", "--resume", "--seed=5"], "seed=0, not 5"),
    "another text": (["--out=run", "--resume", "--data=builtin"], "data='text.txt', not 'builtin'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(home, tiny, quietstar, request, case):
    arguments, message = BAD_INPUT[case]
    if "--out=run" in arguments:
        request.getfixturevalue("trained")
    (home / "empty.txt").write_text("\n")
    (home / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (home / "lines.jsonl").write_text('{"text": "a"}\n')
    (home / "short.txt").write_text("ab")
    (home / "empty").mkdir()
    tiny("llama").save_pretrained("bare")
    code, _, err = quietstar("train", "--model=model", "--data=text.txt", *SMALL, *arguments)
    assert code == cli.DATA and len(err) == 1 and err[0].startswith("quietstar: ") and message in err[0], err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["think", "--model=model", "Hello"], "not a QuietStar checkpoint"),
        (["think", "--model=nowhere", "Hello"], "nowhere"),
        (["think", "--model=run", ""], "the prompt has no tokens"),
        (["think", "--model=run", "Hello", "--at", "5"], "--at must be from -5 to 4 in a text of 5 tokens, got 5"),
        (["eval", "--model=run", "--held-out=1", "--length=16"], "at least 2 texts"),
        (["doctor", "--model=nowhere"], "nowhere"),
        (["doctor", "--model=mamba"], "cannot think"),
    ],
)
def test_bad_input_of_the_other_commands(home, quietstar, trained, arguments, message):
    (home / "mamba").mkdir()
    (home / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    code, _, err = quietstar(*arguments)
    assert code == cli.DATA and len(err) == 1 and message in err[0], err


def test_a_damaged_model_is_named(home, quietstar):
    weights = home / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = quietstar("train", "--model=model", *SMALL)
    assert code == cli.DATA and len(err) == 1 and "no model loads" in err[0], err


@pytest.mark.parametrize("out", ["/proc/nowhere", "text.txt/run"], ids=["unwritable", "under a file"])
def test_a_folder_that_cannot_be_written(quietstar, out):
    code, _, err = quietstar("train", "--model=model", "--data=text.txt", *SMALL, f"--out={out}")
    assert code == cli.RUNTIME and len(err) == 1 and "no checkpoint was written yet" in err[0], err


def test_a_failure_in_the_middle_names_the_last_whole_checkpoint(home, quietstar, monkeypatch):
    save, saved = snapshots.save_file, []

    def full(tensors, path, **options):
        saved.append(path)
        if len(saved) > 1:
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path, **options)

    monkeypatch.setattr(snapshots, "save_file", full)
    code, _, err = quietstar("train", "--model=model", "--data=text.txt", *SMALL, "--out=run")
    assert code == cli.RUNTIME and "No space left on device" in err[-1]
    assert err[-1].endswith("the last whole checkpoint is run/checkpoints/step-000002")


def test_a_loss_that_is_not_finite(home, quietstar):
    code, _, err = quietstar(
        "train", "--model=model", "--data=text.txt", *SMALL, "--learning-rate=1e30", "--warmup=0", "--clip=0"
    )
    assert code == cli.RUNTIME and "the loss is nan" in err[-1], err


def test_a_signal_says_how_to_go_on(home, quietstar, trained, monkeypatch):
    losses = [json.loads(line)["loss"] for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    count_targets = QuietStar.count_targets

    def terminated(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return count_targets(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QuietStar, "count_targets", terminated)
        code, _, err = quietstar("train", "--config=run/config.json", "--out=stopped")
    assert code == cli.SAVED and "stopped by a signal and saved stopped/checkpoints/step-000001" in err[-1]
    program, *again = shlex.split(err[-1].partition("go on with: ")[2])
    assert program == "quietstar" and quietstar(*again)[0] == 0
    metrics = [json.loads(line) for line in (home / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in metrics] == losses


def test_ctrl_c_before_anything_is_saved(quietstar, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_data", interrupted)
    code, _, err = quietstar("train", "--model=model", *SMALL)
    assert code == cli.STOPPED and len(err) == 1


def test_weights_stay_where_they_were(home, quietstar, trained):
    """The model that training began with is not written to."""
    assert sorted(path.name for path in (home / "model").iterdir() if path.suffix == ".safetensors") == ["model.safetensors"]
    assert torch.isfinite(QuietStar.from_pretrained("run/checkpoints/step-000004").start_embedding).all()
