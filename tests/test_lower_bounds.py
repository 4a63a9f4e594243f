"""constraints-lowest.txt, which `make test-lowest` installs, holds the lower bounds that pyproject.toml states."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("reads TOML with the standard library", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[1]
# Where the tests can't have the oldest version; constraints-lowest.txt says why.
ABOVE = {"torch"}


def lower_bounds():
    """Of everything that the package itself needs, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["train"]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)(?:;.*)?", requirement).groups() for requirement in needed)


def numbers(version):
    """1.3 and 1.3.0 are the same version."""
    return tuple(int(part) for part in re.sub(r"(\.0)+$", "", version).split("."))


def test_the_second_environment_has_the_lower_bounds():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    installed = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name, bound in lower_bounds().items():
        if name in ABOVE:
            assert numbers(installed[name]) > numbers(bound), f"{name} has its bound: take it out of ABOVE"
        else:
            assert numbers(installed[name]) == numbers(bound), name
