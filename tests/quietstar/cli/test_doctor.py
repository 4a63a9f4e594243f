"""``quietstar doctor``: what this machine has, and what training needs; and ``train``, which refuses what doesn't fit."""

import re

import pytest

from quietstar.cli import common, errors

SIZES = ["--model=model", "--batch-size=8", "--length=64", "--thoughts=3"]


@pytest.fixture
def free(monkeypatch):
    """``free(MiB)``: as if so much memory were free."""
    return lambda size: monkeypatch.setattr(common, "free_memory", lambda device: size * 2**20)


def test_doctor(quietstar):
    code, out, _ = quietstar("doctor")
    assert code == 0 and "transformers" in out and "thought_attention" in out
    places = ("Python ", "  /", "CPU library ")  # have no spaces to break at
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(places))
    code, out, _ = quietstar("doctor", "--model=model", "--batch-size=2", "--length=64", "--thoughts=3", "--verify")
    assert code == 0 and "2 x 64 tokens, 5,504 rows" in out and "optimizer moments" in out and "ok" in out.splitlines()[-1]
    assert re.search(r"^fits in the .* that are free$", out, re.MULTILINE)
    assert "\n  linear_logprob keeps logits for its backward up to 256 MiB\n" in out
    assert re.search(r"^  LM head on a GPU that has [0-9.]+ GiB +[0-9.]+ MiB$", out, re.MULTILINE)


# Options of train; texts at a time, places that think in each, rows of a place.
COMMANDS = [
    ("--preset=lora --anchors=entropy --anchor-share=0.1 --thoughts=2 --thought-tokens=8 --lookahead=4", 8, 7, 2 * 13),
    ("--preset=rlp --anchor-count=2 --thoughts=2 --thought-tokens=16 --batch-size=3", 3, 2, 2 * (18 + 7 + 8 - 2)),
    ("--preset=rpt --thoughts=2 --thought-tokens=16 --optimizer=fused --steps=3 --out=run", 8, 8, 2 * (18 + 7 + 8 - 2)),
    ("--anchors=every --anchor-stride=8 --thoughts=1 --thought-tokens=2 --lookahead=2 --accumulation=4", 2, 8, 5),
]


@pytest.mark.parametrize("command, texts, places, rows", COMMANDS)
def test_it_takes_the_command_line_of_train(quietstar, command, texts, places, rows):
    code, out, err = quietstar("doctor", "--model=model", "--length=64", "--data=text.txt", *command.split())
    assert code == 0, err
    assert f"{texts} x 64 tokens, {texts * (64 + places * rows):,} rows" in out


def test_the_config_file_and_the_model_of_a_run(quietstar, trained):
    table = re.compile(r"16 tokens, [0-9,]+ rows.*together, a process", re.DOTALL)
    typed = ["--length=16", "--batch-size=4", "--thoughts=2", "--thought-tokens=2", "--lookahead=2", "--embedding-scale=1"]
    found = [quietstar("doctor", *options) for options in (["--model=model", *typed], ["--config=run/config.json"])]
    found += [quietstar("doctor", "--model=run", "--batch-size=4")]
    assert [code for code, _, _ in found] == [0, 0, 0], found
    kept = [re.sub(r".*Python and libraries.*", "", table.search(out)[0]) for _, out, _ in found]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("size", [30, 12])
def test_what_would_fit_is_named_and_does(quietstar, free, monkeypatch, size):
    free(size)
    code, out, _ = quietstar("doctor", *SIZES)
    last = out.splitlines()[-1]
    assert code == 0 and last.startswith("doesn't fit: a step needs about ") and f"{size}.0 MiB are free: " in last
    code, out, _ = quietstar("doctor", *SIZES, *last.split(" with ")[1].split())
    assert code == 0 and out.splitlines()[-1].startswith("fits")


def test_nothing_fits(quietstar, free):
    free(1)
    code, out, _ = quietstar("doctor", *SIZES)
    assert code == 0 and "1.0 MiB are free: shorter texts (--length) or thoughts, a smaller model or --lora-rank" in out


UNFIT = ["--out=run", "--batch-size=8", "--steps=1", "--eval-every=0"]


def test_train_refuses_what_does_not_fit(home, train, free):
    free(4)
    code, _, err = train(*UNFIT)
    assert code == errors.RUNTIME and not (home / "run").exists()
    reason, options_that_fit = err[-1].split("; ")[0].split(" with ")
    assert "a step needs about" in reason and err[-1].endswith("; --no-check-memory tries it all the same")
    for options in (options_that_fit.split(), ["--no-check-memory", "--out=all-the-same"]):
        code, _, err = train(*UNFIT, *options)
        assert code == 0, err


def test_a_type_whose_memory_cannot_be_estimated_trains_unchecked(home, quietstar, train, free, monkeypatch):
    def unable(*arguments):
        raise RuntimeError("aten.nonzero.default")

    monkeypatch.setattr("quietstar.memory.step._decoder", unable)
    free(2)
    code, _, err = train("--out=run", "--steps=1", "--eval-every=0")
    assert code == 0 and "can't be estimated" in err[0] and len(err) == 1
    code, _, err = quietstar("doctor", *SIZES)
    assert code == errors.DATA and "memory of a step can't be estimated for model type 'llama'" in err[0]
