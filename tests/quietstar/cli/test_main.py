"""The command line as a whole: help, usage errors, and input that no command can use."""

import pytest

from quietstar.cli import errors
from quietstar.cli.main import COMMANDS
from quietstar.config import ThoughtConfig, TrainConfig, filled_by
from quietstar.data.texts import DataConfig


@pytest.mark.parametrize("command", COMMANDS)
def test_help(quietstar, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = quietstar(command, "--help")
    assert code == 0 and not err
    if command == "train":
        flat = " ".join(out.replace("│", " ").split())
        official = {name: "empty" if x == "" else x for name, x in filled_by("official").items()}
        for config in (DataConfig, ThoughtConfig, TrainConfig):
            for name, field in config.__dataclass_fields__.items():
                assert f"--{name.replace('_', '-')}" in flat
                default = {"": "''", None: "none"}.get(field.default, field.default)
                shown = f"the preset's; {official[name]} in official" if name in official else f"default: {default}"
                assert f"{field.metadata['help']} ({shown})" in flat, name
        assert "(required)" in flat


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["think", "--model=model", "Hello"], "not a QuietStar checkpoint"),
        (["generate", "--model=model", "Hello"], "quietstar train --model model makes one of a language model"),
        (["think", "--model=run", "Hello", "--chat"], "the tokenizer has no chat template"),
        (["think", "--model=nowhere", "Hello"], "nowhere"),
        (["think", "--model=run", ""], "the prompt has no tokens"),
        (["think", "--model=run", "Hello", "--at", "5"], "--at must be from -5 to 4 in a text of 5 tokens, got 5"),
        (["eval", "--model=run", "--held-out=1"], "at least 2 texts"),
        (["doctor", "--model=mamba"], "cannot think"),
    ],
)
def test_bad_input_of_the_other_commands(home, quietstar, trained, arguments, message):
    (home / "mamba").mkdir()
    (home / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    code, _, err = quietstar(*arguments)
    assert code == errors.DATA and message in err[-1] and sum(line.startswith("quietstar: ") for line in err) == 1, err
