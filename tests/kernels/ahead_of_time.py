"""Compiles what the host functions launch for GPUs that this machine doesn't have, and reads registers and instructions.

The host function of an op runs on meta tensors; Triton's own launch path compiles its kernels for the architecture that
``compiled_for`` names and launches nothing. So what is compiled is what would run, and a host function that reads a
tensor's values, which on a GPU would wait for the device, fails here.

Needs TRITON_INTERPRET=0 from the start of the process; ``compile_op.py`` sets it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class _Device:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A number for each target, since Triton keeps compiled kernels by device."""
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def compiled_for(target: str) -> Iterator[list[Any]]:
    """Inside, each launch compiles its kernel for ``target`` and appends it to the list."""
    compiled: list[Any] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    device = driver._active
    driver.set_active(_Device(TARGETS[target]))
    JITFunction.run = record
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = device


@dataclass
class Resources:
    """What a compiled kernel takes. ``matrix`` counts matrix instructions by mnemonic; ``loops`` are for NVIDIA only."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    warps: int
    instructions: int
    matrix: dict[str, int]
    loops: list[machine_code.Loop]


def resources(kernel: Any, target: str) -> Resources:
    """Read from the disassembly (NVIDIA) or the assembler's metadata (AMD). Spills are local loads and stores, or words of
    scratch memory."""
    read = _amd if target.startswith("gfx") else _nvidia
    registers, spills, *code = read(kernel)
    meta = kernel.metadata
    return Resources(meta.name, target, registers, spills, meta.shared, meta.num_warps, *code)


def _nvidia(kernel: Any) -> tuple[int, int, int, dict[str, int], list[machine_code.Loop]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    code = machine_code.instructions(sass)
    ops = [x.mnemonic for x in code]
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    matrix = {name: ops.count(name) for name in sorted(set(ops)) if "MMA" in name}
    loops = machine_code.loops(code)
    return registers, ops.count("LDL") + ops.count("STL"), len(code) - ops.count("NOP"), matrix, loops


def _amd(kernel: Any) -> tuple[int, int, int, dict[str, int], list[machine_code.Loop]]:
    text = kernel.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # noqa: E731
    # Scalar registers spill to lanes of vector registers. Spills to memory take a private segment, in bytes per lane.
    spills = max(number("vgpr_spill_count"), number("private_segment_fixed_size") // 4)
    code = re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|ds|scratch)_\w+", text, re.M)
    return number("vgpr_count"), spills, len(code), {"MFMA": len(re.findall(r"\bv_mfma", text))}, []
