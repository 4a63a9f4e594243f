"""The examples of the kernels and of group RL run, and what they compare is equal."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.long
@pytest.mark.parametrize("name, needs, lines", [("branches", "torch", 3), ("shared_prompts", "trl", 1)])
def test_it_says_how_little_the_ways_differ(name, needs, lines):
    pytest.importorskip(needs, minversion="1.16" if needs == "trl" else None)
    run = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    differences = re.findall(r"differs? by at most (\S+)", run.stdout)
    assert len(differences) == lines and max(map(float, differences)) < 1e-5
