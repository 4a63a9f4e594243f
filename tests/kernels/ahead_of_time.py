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
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
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
def compiled_for(target: str, only: Container[str] | None = None) -> Iterator[list[Any]]:
    """Inside, each launch compiles its kernel for ``target`` and appends it to the list, or the kernels named ``only``."""
    compiled: list[Any] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if only is not None and self.fn.__name__ not in only:
            return None
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
    """What a compiled kernel takes. ``spills`` are words of local or scratch memory, ``matrix`` the matrix instructions."""

    kernel: str
    registers: int
    spills: int
    shared: int
    warps: int
    matrix: int


def resources(kernel: Any) -> Resources:
    """Read from the binary (NVIDIA) or the assembler's metadata (AMD)."""
    registers, spills, matrix = (_nvidia if "cubin" in kernel.asm else _amd)(kernel)
    meta = kernel.metadata
    return Resources(meta.name, registers, spills, meta.shared, meta.num_warps, matrix)


def _nvidia(kernel: Any) -> tuple[int, int, int]:
    usage = _cuobjdump(kernel, "--dump-resource-usage")
    number = lambda key: int(re.search(rf"{key}:(\d+)", usage)[1])  # noqa: E731
    matrix = re.findall(r"^\s*(?:@!?%\w+ )?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", kernel.asm["ptx"], re.M)
    return number("REG"), (number("STACK") + number("LOCAL")) // 4, len(matrix)


def _amd(kernel: Any) -> tuple[int, int, int]:
    text = kernel.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # noqa: E731
    # Scalar registers spill to lanes of vector registers. Spills to memory take a private segment, in bytes per lane.
    spills = max(number("vgpr_spill_count"), number("private_segment_fixed_size") // 4)
    return number("vgpr_count"), spills, len(re.findall(r"\bv_mfma", text))


def disassembly(kernel: Any) -> str:
    """Takes half a second, most of it the start of NVIDIA's disassembler."""
    return _cuobjdump(kernel, "-sass")


def _cuobjdump(kernel: Any, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True).stdout
