"""A folder with a tiny model in which the commands run."""

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from quietstar.cli.main import main
from tests.quietstar.conftest import make_byte_tokenizer

SMALL = ["--length=16", "--steps=4", "--batch-size=4", "--thoughts=2", "--thought-tokens=2", "--lookahead=2", "--held-out=4"]
SMALL += ["--save-every=2", "--eval-every=2", "--learning-rate=1e-3", "--policy-weight=3", "--embedding-scale=1"]


def data_of(options):
    """The data unless the options name others, which would be read beside it."""
    return [] if any(x.startswith("--data=") for x in options) else ["--data=text.txt"]


class Home:
    """A folder that is made anew for each test, always in the same place, since runs remember where their data are."""

    def __init__(self, folder, model):
        self.place, self.template, self.runs = folder / "home", folder / "template", {}
        model.save_pretrained(self.template / "model")
        make_byte_tokenizer().save_pretrained(self.template / "model")
        (self.template / "text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(40)))
        rows = [{"text": f"Line {i} of the file has words of its own, {i * i} of them."} for i in range(60)]
        (self.template / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reset(self):
        shutil.rmtree(self.place, ignore_errors=True)
        return shutil.copytree(self.template, self.place)

    def trained(self, *options):
        """What a run into the folder ``run`` printed; the run is made once."""
        if options not in self.runs:
            with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
                code = main(["train", "--model=model", *data_of(options), *SMALL, "--out=run", *options])
            assert code == 0, err.getvalue()
            kept = shutil.copytree("run", self.place.parent / f"run-{len(self.runs)}")
            self.runs[options] = kept, out.getvalue()
        shutil.copytree(self.runs[options][0], "run", dirs_exist_ok=True)
        return self.runs[options][1]


@pytest.fixture(scope="session")
def the_home(tiny, tmp_path_factory):
    return Home(
        tmp_path_factory.mktemp("cli"), tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    )


@pytest.fixture
def home(the_home, monkeypatch):
    """A folder with a model and texts, where the commands run."""
    folder = the_home.reset()
    monkeypatch.chdir(folder)
    return folder


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
    return lambda *arguments: quietstar("train", "--model=model", *data_of(arguments), *SMALL, *arguments)


@pytest.fixture
def trained(home, the_home):
    """What a run in the folder ``run`` printed."""
    return the_home.trained()
