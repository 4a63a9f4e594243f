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
