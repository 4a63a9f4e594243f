"""The types of the public functions reach a program that uses the installed packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_a_users_program(tmp_path):
    """As installed: mypy is not told where the sources are, and finds them as it finds any package."""
    (tmp_path / "consumer.py").write_text((ROOT / "tests/typed/consumer.py").read_text())
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-transformers.*,peft.*,numpy.*]\nfollow_imports = skip\n"
    )  # slow
    command = [sys.executable, "-m", "mypy", "--python-executable", sys.executable, "consumer.py"]
    outside = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
