"""Builds csrc/cpu/ with grid.cpp, without PyTorch: with either compiler, a sanitizer, or a bug in a copy of the sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc/cpu"
BUILT = HERE.parents[1] / "build/tests/cpu-library"
_spec = importlib.util.spec_from_file_location("setup", HERE.parents[1] / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)
SETS = setup.SETS
FLAGS = [*setup.COMPILE_CPU.split(), "-Wextra", "-g", "-pthread"]
SANITIZERS = {
    "plain": ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
    "pairs": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DQUIETSTAR_PAIRS"],  # emulated
}
LIMITS = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "avx512_bf16": ""}  # of ATEN_CPU_CAPABILITY


ARM = "aarch64-linux-gnu-g++"  # a cross compiler, whose programs an emulator runs
EMULATOR = "qemu-aarch64-static"


def build(compiler: str = "g++", kind: str = "plain", bug: tuple[str, str, str] | None = None) -> Path:
    """The program; ``bug`` is a file of csrc/cpu/, and what is replaced in it by what; only the baseline is compiled then."""
    texts = {path.name: path.read_text() for path in sorted([*SOURCES.iterdir(), HERE / "grid.cpp"])}
    if bug:
        name, old, new = bug
        assert texts[name].count(old) == 1, f"{name} has {texts[name].count(old)} times {old!r}"
        texts[name] = texts[name].replace(old, new)
        texts["choose.cpp"] = texts["choose.cpp"].replace("defined(__x86_64__)", "false")
    digest = hashlib.sha256(repr((texts, compiler, FLAGS, SANITIZERS[kind], SETS)).encode()).hexdigest()[:16]
    program = BUILT / digest / "grid"
    if program.exists():
        return program
    folder = BUILT / f"{digest}.{os.getpid()}"
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    flags = [compiler, *FLAGS, *SANITIZERS[kind], *["-static"] * (compiler == ARM)]
    sets = {"baseline": []} if bug or compiler == ARM else setup.known_sets(compiler)
    flags += ["-DQUIETSTAR_BF16"] * ("avx512_bf16" in sets)
    commands = [
        [*flags, f"-DQUIETSTAR_SET={name}", *more, "-c", "kernels.cpp", "-o", f"{name}.o"] for name, more in sets.items()
    ]
    for running in [subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) for command in commands]:
        said = running.communicate()[1]
        assert running.returncode == 0 and not said, said
    subprocess.run([*flags, "choose.cpp", "grid.cpp", *(f"{name}.o" for name in sets), "-o", "grid"], cwd=folder, check=True)
    (folder / "grid").chmod(0o755)
    program.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder / "grid", program)
    shutil.rmtree(folder)
    return program


def run(program: Path, name: str, threads: int, cases: int) -> subprocess.CompletedProcess[str]:
    """stdout names the instruction set and the hash of all results."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": LIMITS[name], "TSAN_OPTIONS": "halt_on_error=1"}
    emulator = [EMULATOR] * (program.read_bytes()[18] == 183)  # the ELF header's machine: Arm
    return subprocess.run([*emulator, program, str(threads), str(cases)], env=environment, capture_output=True, text=True)
