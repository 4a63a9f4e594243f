"""What was typed, and config files."""

import pytest

from quietstar.cli.main import COMMANDS
from quietstar.cli.options import parse


def test_resume_alone_is_auto():
    for command in ("train", "star", "fast"):
        assert parse(COMMANDS, [command, "--model=m", "--resume"]).resume == "auto"
        assert parse(COMMANDS, [command, "--model=m", "--resume", "--out=a"]).resume == "auto"
    with pytest.raises(SystemExit):  # a recipe continues the run of --out, and no other checkpoint
        parse(COMMANDS, ["star", "--model=m", "--resume=runs/other"])


def test_several_data_are_all_read():
    for typed in (["--data", "a.txt", "--data=b.txt"], ["--data=a.txt,b.txt"]):
        command = parse(COMMANDS, ["train", *typed[:2], "--model=m", *typed[2:]])
        assert (command.data.data, command.model) == ("a.txt,b.txt", "m")
