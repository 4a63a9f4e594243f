"""docs/cli.md holds what docs/cli.py writes from the commands of today, and these have the options that --help shows."""

import re
import runpy
from pathlib import Path

import pytest

from quietstar.cli import errors
from quietstar.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
cli = runpy.run_path(str(ROOT / "docs/cli.py"))


def test_page_is_current():
    assert (ROOT / "docs/cli.md").read_text() == cli["page"](), "docs/cli.md is stale: run `python docs/cli.py`"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_are_those_of_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = re.findall(r"^[│ ] (?:([A-Z]{2,})|--([\w-]+))", capsys.readouterr().out, re.MULTILINE)
    assert sorted(text or option for text, option in shown) == sorted(cli["names_of"](COMMANDS[name]))


def test_exit_codes_are_those_of_the_code():
    codes = {int(code) for code, _ in cli["exit_codes"]()}
    assert codes == {0, errors.USAGE, errors.DATA, errors.RUNTIME, errors.SAVED, errors.STOPPED, errors.PIPE}


def test_every_option_says_what_it_does():
    """And no table breaks: a row has four cells."""
    page = (ROOT / "docs/cli.md").read_text()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    assert all(len(row) == 4 and row[3].strip() for row in rows)
