"""A folder with a tiny model in which the commands run."""

import re

import pytest

from quietstar.cli.main import main

SMALL = ["--length=16", "--steps=4", "--batch-size=4", "--thoughts=2", "--thought-tokens=2", "--lookahead=2", "--held-out=4"]
SMALL += ["--save-every=2", "--eval-every=2", "--learning-rate=1e-3", "--policy-weight=3", "--embedding-scale=1"]


@pytest.fixture
def home(tiny, byte_tokenizer, tmp_path, monkeypatch):
    """An empty folder with a model and a text in it, where the commands run."""
    monkeypatch.chdir(tmp_path)
    tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48).save_pretrained("model")
    byte_tokenizer.save_pretrained("model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(40)))
    return tmp_path


@pytest.fixture
def quietstar(home, capsys):
    """``quietstar("train", ...)``: exit code, what was printed, and the lines on stderr that are not progress."""

    def run(*arguments):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        lines = err.replace("\r", "\n").splitlines()  # a bar's return leaves an empty one
        return code, out, [line for line in lines if line.strip() and not re.search(r"it/s| ETA |^step \d|^  = mixing ", line)]

    return run


@pytest.fixture
def train(quietstar):
    """``train(...)``: a short run of ``quietstar train``; options that are given again win."""
    return lambda *arguments: quietstar("train", "--model=model", "--data=text.txt", *SMALL, *arguments)


@pytest.fixture
def trained(train):
    """What a run in the folder ``run`` printed."""
    code, out, err = train("--out=run")
    assert code == 0, err
    return out
