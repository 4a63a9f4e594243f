"""The CUDA kernels on the CPU, for tests: g++ compiles csrc/*.cu with emulation.hpp, and the back end "cuda" runs that.

Results are kept in build/emulation, by a hash of the sources and the command; ``make clean`` removes them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch

from quietstar_kernels.cuda import _library
from quietstar_kernels.cuda import sample_token as cuda_sample_token
from quietstar_kernels.cuda import thought_decode as cuda_thought_decode

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILT = HERE.parents[1] / "build" / "emulation"

COMMON = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DQUIETSTAR_EMULATION"]
COMMON += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-local-typedefs", "-fmax-errors=3"]
# By what a build finds. With UBSan's checks of every pointer, g++ would take half a minute per file.
KINDS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    + ["-fno-sanitize=null,object-size,vptr,pointer-overflow"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


class Bug(NamedTuple):
    """Changes to the sources, each (file, old, new). Apart from white space, the file must contain ``old`` exactly once.

    Only ``units`` are compiled with the changes.
    """

    units: tuple[str, ...]
    changes: tuple[tuple[str, str, str], ...]


def missing() -> str | None:
    """What this machine lacks to build the kernels, in words; None if nothing."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no headers of Python"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def build(kind: str = "plain", bug: Bug | None = None) -> Path:
    """Build a Python module of the kernels. Tests in other processes wait for it.

    Args:
        kind: one of ``KINDS``.
        bug: to plant.

    Raises:
        RuntimeError: g++ fails, with its output; or the sources no longer contain the text of the bug.
    """
    texts = _texts()
    planted = texts if bug is None else _plant(bug, texts)
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = [
            pool.submit(_compile, unit, planted if bug and unit in bug.units else texts, KINDS[kind])
            for unit in sorted(texts)
            if unit.endswith(".cu")
        ]
        # The bindings compute nothing, so they need no sanitizer.
        jobs.append(pool.submit(_compile, "bindings.cpp", texts, ["-O1", *_python_headers()]))
        return _link([job.result() for job in jobs], KINDS[kind])


def load(library: Path) -> ModuleType:
    """The module, with the functions of csrc/bindings.cpp."""
    loader = importlib.machinery.ExtensionFileLoader("emulated", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("emulated", loader))
    loader.exec_module(module)
    return module


@contextmanager
def serving(kernels: ModuleType, shared_memory: int = 227 * 1024) -> Iterator[None]:
    """Inside, the back end "cuda" serves tensors on the CPU with ``kernels``, as a GPU with this much memory per block."""

    def product(hidden, weight, out):  # PyTorch multiplies bf16 into fp32 only on GPUs
        torch.mm(hidden.float(), weight.float().T, out=out)

    with (
        mock.patch.object(_library, "ops", lambda: kernels),
        mock.patch.object(_library, "why_not", lambda device: None),
        mock.patch.object(cuda_sample_token, "product", product),
        mock.patch.object(cuda_thought_decode, "shared_memory", lambda device: shared_memory),
    ):
        yield


def environment(kind: str) -> dict[str, str]:
    """For a Python process that loads a build of this kind: the library of a sanitizer must be loaded first."""
    if kind == "plain":
        return dict(os.environ)
    name = {"address": "libasan.so", "thread": "libtsan.so"}[kind]
    library = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
    }


def _texts() -> dict[str, str]:
    """All sources, by name."""
    paths = [*CSRC.glob("*.cu*"), *HERE.glob("*.cu*"), *HERE.glob("*.hpp"), HERE / "bindings.cpp"]
    return {path.name: path.read_text() for path in paths}


def _plant(bug: Bug, texts: dict[str, str]) -> dict[str, str]:
    texts = dict(texts)
    for file, old, new in bug.changes:
        place = r"\s+".join(map(re.escape, old.split()))
        if (count := len(re.findall(place, texts[file]))) != 1:
            raise RuntimeError(f"{file} has {old!r} {count} times, so this bug can't be planted")
        texts[file] = re.sub(place, lambda _, new=new: new, texts[file])
    return texts


def _needed(name: str, texts: dict[str, str]) -> dict[str, str]:
    """A source and those that it includes."""
    needed, waiting = {}, [name]
    while waiting:
        name = waiting.pop()
        if name in texts and name not in needed:
            needed[name] = texts[name]
            waiting += re.findall(r'#include "(.*)"', texts[name])
    return needed


def _compile(unit: str, texts: dict[str, str], flags: list[str]) -> Path:
    """The object file of the unit, in a folder with its sources."""
    needed, command = _needed(unit, texts), [*COMMON, *flags, "-x", "c++", "-c", unit]
    folder = BUILT / _hash(command, sorted(needed.items()))
    folder.mkdir(exist_ok=True)
    for name, text in needed.items():
        (folder / name).write_text(text)
    return _make(folder / "object.o", command)


def _link(objects: list[Path], flags: list[str]) -> Path:
    return _make(BUILT / f"{_hash(objects, flags)}.so", ["g++", "-shared", *flags, *map(str, objects)])


def _make(path: Path, command: list[str]) -> Path:
    if not path.exists():
        part = path.with_suffix(".part")
        done = subprocess.run([*command, "-o", part.name], cwd=path.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        part.replace(path)
    return path


def _hash(*what: object) -> str:
    return hashlib.sha256(repr((_compiler(), what)).encode()).hexdigest()[:16]


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _python_headers() -> list[str]:
    import pybind11

    return [f"-I{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]


if __name__ == "__main__" and missing() is None:  # before tests that take less time than this
    build()
