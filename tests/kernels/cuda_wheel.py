"""Builds the CUDA wheel once for all tests: ``make wheel`` in a copy of the sources, kept in build/ by their hash."""

import contextlib
import fcntl
import functools
import hashlib
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
BIN = Path(sys.executable).parent


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


@functools.cache
def built():
    """The folder with the results of ``make wheel``, dist/ and build/wheel/. Skips the test if nothing can be compiled."""
    for tool in ("nvcc", "make", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} on PATH")
    if not (BIN / "auditwheel").exists():
        pytest.skip("auditwheel is not installed")
    digest = hashlib.sha256(run(["nvcc", "--version"], ROOT).encode() + sys.version.encode())
    files = [path for part in PARTS for path in sorted((ROOT / part).rglob("*")) if path.is_file()]
    for path in [*files, *(ROOT / file for file in FILES)]:
        if path.suffix not in (".pyc", ".so"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    folder = ROOT / "build" / "tests" / digest.hexdigest()[:16]
    with locked(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            copy_sources(folder)
            run(["make", "wheel", f"BIN={BIN}", "READY="], folder, TORCH_CUDA_ARCH_LIST="", MAKEFLAGS="")
            install(folder / "bare", next((folder / "dist").glob("*.whl")))
            (folder / "done").touch()
    return folder


@contextlib.contextmanager
def locked(file):
    """One process at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(folder, wheel):
    """A new environment with the wheel. It sees the packages of this one, except an editable install of this project."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-index", "--no-deps", wheel], ROOT)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")


def bare_python(*arguments, folder):
    """Run the new environment's Python without a compiler and without a CUDA toolkit on its PATH."""
    python = built() / "bare" / "bin"
    environment = {"PATH": str(python), "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python / "python", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
