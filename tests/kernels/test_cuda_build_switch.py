"""QUIETSTAR_BUILD: what is built with which tools, and the message that gives the reason."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

sys.path.append(str(Path(__file__).parent))
from cuda_wheel import copy_sources

pytestmark = pytest.mark.build
NO_NVCC, NO_CXX = "there is no nvcc on PATH", "there is no c++ on PATH"
TOOLS = ("cat", "cc", "c++", "ninja", "as", "ld", "nm")
WITHOUT_CXX = tuple(tool for tool in TOOLS if tool != "c++")
COMPILER_SAYS = """csrc/x.cu(5): warning #177-D: variable "error" was declared but never referenced

csrc/x.cu(7): error: identifier "y" is undefined
      y = 1;
      ^
1 error detected in the compilation of "csrc/x.cu"."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    copy_sources(folder)
    return folder


def build(sources, to, python=(sys.executable,), quiet=True, tools_of=TOOLS, **environment):
    """Build a wheel without nvcc on PATH. Returns its exit code, its output and the wheel's name."""
    tools = to / "bin"
    tools.mkdir(parents=True)
    for tool in tools_of:
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    if "c++" in tools_of:  # whose code is not run here: then optimising it takes minutes for nothing
        (tools / "c++").unlink()
        (tools / "c++").write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0\n')
        (tools / "c++").chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "TORCH", "QUIETSTAR"))}
    done = subprocess.run(
        [*python, "setup.py", *["-q"] * quiet, "egg_info", "--egg-base", to, "build", "--build-base", to, "bdist_wheel"]
        + ["--bdist-dir", to / "bdist", "--dist-dir", to],
        cwd=sources,
        env=clean | {"PATH": str(tools)} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, [path.name for path in to.glob("*.whl")]


WITHOUT = "quietstar-kernels is installed without its {}: {}."


@pytest.mark.parametrize("switch", ["auto", "python"])
def test_pure_python(switch, sources, tmp_path):
    tools = WITHOUT_CXX if switch == "auto" else TOOLS
    code, output, (wheel,) = build(sources, tmp_path / "out", tools_of=tools, QUIETSTAR_BUILD=switch)
    assert code == 0 and wheel.endswith("-py3-none-any.whl")
    sentences = [line for line in output.splitlines() if "without" in line]
    both = [WITHOUT.format("CPU library", NO_CXX), WITHOUT.format("CUDA back end", NO_NVCC)]
    assert sentences == (both if switch == "auto" else [])


def test_the_cpu_library_alone(sources, tmp_path):
    """Without nvcc; ``make setup`` builds with the switch "cpu"."""
    code, output, (wheel,) = build(sources, tmp_path / "out", QUIETSTAR_BUILD="auto")
    assert code == 0 and "-py3-none-linux_" in wheel
    with zipfile.ZipFile(tmp_path / "out" / wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == ["quietstar_kernels/cpu/_C.abi3.so"]
    assert [line for line in output.splitlines() if "without" in line] == [WITHOUT.format("CUDA back end", NO_NVCC)]


def test_pure_python_in_an_environment_of_pips_own(sources, tmp_path):
    """It has setuptools, and not PyTorch."""
    site = Path(setuptools.__file__).parents[1]
    for path in (*site.glob("setuptools*"), site / "_distutils_hack"):
        (tmp_path / path.name).symlink_to(path)
    chosen = {"CUDA_HOME": str(failing_toolkit(tmp_path)), "PYTHONPATH": str(tmp_path)}
    code, output, wheels = build(sources, tmp_path / "out", (sys.executable, "-S"), **chosen)
    assert code == 0 and wheels[0].endswith("-py3-none-any.whl"), output
    assert "PyTorch can't be imported; where it is installed, --no-build-isolation lets pip see it." in output


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"QUIETSTAR_BUILD": "cuda"}, f"QUIETSTAR_BUILD=cuda: {NO_NVCC}."),
        ({"QUIETSTAR_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "QUIETSTAR_BUILD=cuda: there is no nvcc in /nowhere/bin."),
        ({"QUIETSTAR_BUILD": "cpu", "CXX": "no-compiler"}, "QUIETSTAR_BUILD=cpu: there is no no-compiler on PATH."),
        ({"QUIETSTAR_BUILD": "all"}, "QUIETSTAR_BUILD must be auto, cpu, cuda or python, got 'all'."),
    ],
)
def test_one_sentence_where_it_can_not(environment, said, sources, tmp_path):
    code, output, wheels = build(sources, tmp_path / "out", **environment)
    assert code == 1 and output.strip() == said and not wheels


def failing_toolkit(folder):
    nvcc = folder / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{COMPILER_SAYS}\nEND\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc.parents[1]


@pytest.mark.parametrize("quiet", [True, False])
def test_a_source_that_does_not_compile(quiet, sources, tmp_path):
    """Then nothing else is installed instead, and the whole output of the compiler is shown, once."""
    chosen = {"CUDA_HOME": str(failing_toolkit(tmp_path))}
    code, output, wheels = build(sources, tmp_path / "out", quiet=quiet, tools_of=WITHOUT_CXX, **chosen)
    lines = output.strip().splitlines()
    failed = sum(line.startswith("FAILED: ") for line in lines)
    assert code == 1 and not wheels and failed and output.count(COMPILER_SAYS) == failed
    assert lines[-1] == (
        'The CUDA back end does not compile: csrc/x.cu(7): error: identifier "y" is undefined; '
        "QUIETSTAR_BUILD=python installs without it."
    )
