"""What was typed: options that moved to another command or have another name, and config files."""

import pytest

from quietstar.cli.main import COMMANDS
from quietstar.cli.options import UsageError, parse, read_config


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["eval", "--model=m", "--questions=q.jsonl"],
            "quietstar eval no longer takes --questions: use quietstar ask --questions",
        ),
        (["think", "--model=m", "--export=t.jsonl"], "quietstar think no longer takes --export: use quietstar export --out"),
        (["think", "--model=m", "--data", "a.txt"], "quietstar think no longer takes --data: use quietstar export --data"),
        (["train", "--model=m", "--reference=ema"], "--reference is now --base-model"),
        (["fast", "--model=m", "--reference_decay", "0.9"], "--reference-decay is now --base-model-decay"),
    ],
)
def test_what_to_type_instead(arguments, message):
    with pytest.raises(UsageError) as error:
        parse(COMMANDS, arguments)
    assert str(error.value) == message


def test_a_config_of_an_older_run_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "m", "reference": "ema"}')
    assert read_config(tmp_path / "config.json") == {"model": "m", "base_model": "ema"}
    assert parse(COMMANDS, ["train", f"--config={tmp_path / 'config.json'}"]).thoughts.base_model == "ema"


def test_resume_alone_is_auto():
    for command in ("train", "star", "fast"):
        assert parse(COMMANDS, [command, "--model=m", "--resume"]).resume == "auto"
        assert parse(COMMANDS, [command, "--model=m", "--resume", "--out=a"]).resume == "auto"
    with pytest.raises(SystemExit):  # a recipe continues the run of --out, and no other checkpoint
        parse(COMMANDS, ["star", "--model=m", "--resume=runs/other"])
