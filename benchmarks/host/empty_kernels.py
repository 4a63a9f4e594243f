"""A fake GPU for Triton whose kernels take no time and compute nothing, so that only the host's time is left.

It needs TRITON_INTERPRET=0 from the start of the process, and tensors on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

import quietstar_kernels.triton


class _Utilities:
    """The CUDA driver's part in a launch with tensor descriptors."""

    def fill_tma_descriptor(self, *arguments: Any) -> None:
        return None

    fill_tma_descriptor_tiled = fill_tma_descriptor


class _Driver:
    utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class EmptyKernel(nvidia.CudaLauncher):
    """A compiled kernel and its launcher. All of their Python code runs, but the C function that would launch does nothing.

    Attributes:
        made: names of the kernels compiled so far, one per compilation.
        launches: how many kernels were launched.
    """

    made: list[str] = []
    launches = 0
    launch_metadata = CompiledKernel.launch_metadata

    def __init__(self, source: Any) -> None:
        source.fn.cache_key  # noqa: B018 - collects the globals that every launch looks at
        self.src, self.name, self.run = source, source.name, self
        self.module = self.function = 1
        self.packed_metadata = (4, 1, 0)
        self.num_ctas = self.global_scratch_align = self.profile_scratch_align = 1
        self.global_scratch_size = self.profile_scratch_size = 0
        self.launch_cooperative_grid = self.launch_pdl = self.gsan_enabled = False
        self.arg_annotations = self.kernel_signature = None
        signature = dict(enumerate(source.signature.values()))
        described = [kind for kind in signature.values() if isinstance(kind, str) and kind.startswith("tensordesc")]
        about = {"swizzle": 3, "elem_size": 2, "elem_type": 1, "block_size": [16, 16], "fp4_padded": False}
        self.launch = nvidia.wrap_handle_tensordesc(_launched, signature, [about] * len(described))
        self.made.append(self.name)

    def _init_handles(self) -> None:
        """There is nothing to load."""


def _launched(*arguments: Any) -> None:
    EmptyKernel.launches += 1


def install() -> None:
    """Give this process such a GPU, an sm_90, and let the back end "triton" accept CPU tensors."""
    driver.set_active(_Driver())
    triton.compiler.compile = lambda source, **_: EmptyKernel(source)
    quietstar_kernels.triton.why_not = lambda *arguments, **widths: None
