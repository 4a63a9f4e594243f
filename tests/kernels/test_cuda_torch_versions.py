"""csrc/ compiles with the oldest and the newest PyTorch, and needs nothing from the newest that the oldest doesn't have."""

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from cuda_wheel import ROOT, copy_sources, locked, run

pytestmark = pytest.mark.build
OLDEST, NEWEST = "2.10.0", "2.13.0"
# What includes headers of PyTorch; they are the same in all wheels, and those for this system are the smallest.
KNOWS_TORCH, SMALLEST = "bindings.cpp", ["--platform=macosx_14_0_arm64", "--python-version=3.11", "--only-binary=:all:"]


@functools.cache
def torch_headers(version):
    """A folder with torch/include/, kept in build/. Skips the test if pip can't download its wheel."""
    folder = ROOT / "build" / "torch-headers" / version
    with locked(folder.with_suffix(".lock")):
        if not (folder / "torch/__init__.py").exists():
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", *SMALLEST, f"--dest={folder}"]
            done = subprocess.run([*pip, f"torch=={version}"], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"pip has no wheel of PyTorch {version} here: {done.stderr.strip().splitlines()[-1]}")
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as files:
                files.extractall(folder, [name for name in files.namelist() if name.startswith("torch/include/torch/")])
            wheel.unlink()
            (folder / "torch/__init__.py").touch()  # a package, for setup.py
    return folder


def undefined(version, folder):
    """Compile both ``KNOWS_TORCH`` by setup.py with a version of PyTorch. Returns the names they need from other libraries."""
    if shutil.which("nvcc") is None or shutil.which("ninja") is None:
        pytest.skip("there is no nvcc or no ninja on PATH")
    headers = torch_headers(version)
    copy_sources(folder)
    one_object = folder / "bin/ninja"
    one_object.parent.mkdir()
    one_object.write_text(f'#!/bin/sh\nexec {shutil.which("ninja")} "$@" {KNOWS_TORCH}.o\n')
    one_object.chmod(0o755)
    build = [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={folder}", f"--build-lib={folder}"]
    path = f"{one_object.parent}{os.pathsep}{os.environ['PATH']}"
    run(build, folder, PATH=path, PYTHONPATH=str(headers), QUIETSTAR_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0a")
    found = {}
    for backend in ("cpu", "cuda"):
        deps = run(["ninja", "-t", "deps", f"{KNOWS_TORCH}.o"], folder / backend)
        assert f"{headers}/torch/include/" in deps  # not the installed ones
        names = run(["nm", "--undefined-only", "--format=just-symbols", f"{KNOWS_TORCH}.o"], folder / backend)
        found[backend] = set(names.split())
    return found


def test_one_source_knows_torch():
    for folder in (ROOT / "csrc", ROOT / "csrc/cpu"):
        files = [path for pattern in ("*.c*", "*.h*") for path in folder.glob(pattern) if path.is_file()]
        assert [path.name for path in files if "<torch/" in path.read_text()] == [KNOWS_TORCH]


def test_the_newest_needs_no_name_that_the_oldest_lacks(tmp_path):
    oldest, newest = (undefined(version, tmp_path / version) for version in (OLDEST, NEWEST))
    for found in (oldest, newest):
        assert "aoti_torch_get_current_cuda_stream" in found["cuda"] and "torch_parallel_for" in found["cpu"]
    for backend, names in newest.items():
        assert {name for name in names if "torch" in name} <= oldest[backend]
