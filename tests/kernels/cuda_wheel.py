"""The wheel that ``make wheel`` has built, and an environment with it."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("csrc", "quietstar_kernels", "python")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "CHANGELOG.md", "LICENSE")
LEFT_OUT = ("__pycache__", "*.so", "*.egg-info")


def run(command, folder, **environment):
    """Output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
    return done.stdout


def copy_sources(to):
    for part in PARTS:
        shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for file in FILES:
        shutil.copy2(ROOT / file, to)


def wheel():
    """The wheel in dist/. Skips the test if there is none."""
    found = list((ROOT / "dist").glob("*.whl"))
    if not found:
        pytest.skip("make wheel has not run")
    return found[0]


@contextlib.contextmanager
def locked(file):
    """One process at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def bare_python(*arguments, folder):
    """Run Python in a new environment with the wheel, without a compiler and without a CUDA toolkit on its PATH.

    It sees the packages of this environment, except an editable install of this project.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder / "bare"], ROOT)
    bin = folder / "bare/bin"
    run([sys.executable, "-m", "pip", f"--python={bin}/python", "install", "-q", "--no-index", "--no-deps", wheel()], ROOT)
    (site,) = (folder / "bare/lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {"PATH": str(bin), "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([bin / "python", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
