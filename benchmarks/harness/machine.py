"""What a measured time depends on: the device, the versions of what ran, and the device's peak rates."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.clock import Run, measure
from quietstar_kernels import _dispatch, backends
from quietstar_kernels.cpu import _library, products

COPY = "copy, "  # what the rates of a GPU's ways to copy begin with
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "liger-kernel",
    "quack-kernels",
    "cut-cross-entropy",
    "vllm",
    "trl",
    "prefix-grouper",
    "fla-core",
)


def package_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200" or "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, date and versions, for the results file; of a CPU also the instructions that its compiled library runs."""
    return {
        "device": device_name(device),
        "kind": device.type,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "served_by": served_by(device),
        "instructions": _library.instruction_set() if device.type == "cpu" else None,
        "packages": {name: package_version(name) for name in PACKAGES},
        "load": round(os.getloadavg()[0], 1),
    }


def served_by(device: torch.device) -> dict[str, str]:
    """The back end that serves each op: the one QUIETSTAR_BACKEND names, else the one "auto" chooses."""
    fastest: tuple[str, ...] = (*_dispatch.FASTEST_FIRST[device.type], "reference")
    fastest = (os.environ["QUIETSTAR_BACKEND"],) if "QUIETSTAR_BACKEND" in os.environ else fastest
    available = {(row["op"], row["backend"]) for row in backends(device) if row["status"] == "available"}
    ops = dict.fromkeys(op for op, _ in sorted(available))
    return {op: next(backend for backend in fastest if (op, backend) in available) for op in ops}


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype], size: int | None = None) -> dict[str, float]:
    """Measured peak rates: "copy" in bytes/s, counting reads and writes, and arithmetic in FLOP/s by dtype.

    The copy is the fastest of several ways, of which a GPU's have rates of their own, such as "copy, kernel in a graph". On a
    CPU, arithmetic is multiply-adds in registers, or a matmul that is faster in a dtype. Beside it are the rates of matmuls:
    "PyTorch float32", "oneDNN float32". Without a compiled library, and on a GPU, they are the peak.

    Args:
        size: side of the square matrices, and the copied tensor's size in units of 64 KiB. By default large enough to keep
            the device busy.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    on_library = device.type == "cpu" and not _library.missing()
    ways = _copy_rates(device, size * 16384, on_library)
    copies = {"copy": max(ways.values())}
    if device.type == "cuda":
        copies |= {f"{COPY}{way}": rate for way, rate in ways.items()}
    matmuls = {name_of(x): _matmul_rate(device, x, size) for x in dict.fromkeys([torch.float32] * on_library + [*dtypes])}
    if not on_library:
        return copies | matmuls
    peak = _multiply_add_rate(rounds=4 * size)
    rates = copies | {name: max(peak, rate) for name, rate in matmuls.items()}
    rates |= {f"PyTorch {name}": rate for name, rate in matmuls.items()}
    if torch.backends.mkldnn.is_available():
        rates["oneDNN float32"] = _one_dnn_rate(size)
    return rates


def _copy_rates(device: torch.device, numbers: int, on_library: bool) -> dict[str, float]:
    """Bytes/s of each way to copy. A GPU may run a memory copy elsewhere in a CUDA graph than outside of one, and slower."""
    source = torch.randn(numbers, device=device)
    target, gpu = torch.empty_like(source), device.type == "cuda"
    runs: dict[str, Run] = {"memory copy": lambda: target.copy_(source)}
    if gpu:
        runs["kernel"] = lambda: torch.mul(source, 1, out=target)
    if on_library:
        runs["library"] = lambda: _library.ops().copy(target, source)
    graphs = {"": False, " in a graph": True} if gpu else {"": None}
    size = 2 * source.numel() * source.element_size()
    return {
        f"{name}{where}": size / _fastest(run, device, graph) for name, run in runs.items() for where, graph in graphs.items()
    }


def _multiply_add_rate(rounds: int) -> float:
    numbers = torch.ones(16 * torch.get_num_threads(), 768)
    return 2 * numbers.numel() * rounds / _fastest(lambda: _library.ops().multiply_adds(numbers, rounds), numbers.device)


def _one_dnn_rate(size: int) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _fastest(lambda: products.onednn_linear(a, b), a.device)


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _fastest(lambda: torch.matmul(a, b, out=out), device)


def _fastest(run: Run, device: torch.device, graph: bool | None = None) -> float:
    return measure({"run": [run]}, device, graph=graph)["run"].low


def name_of(dtype: torch.dtype) -> str:
    """ "float32", "bfloat16", ..."""
    return str(dtype).removeprefix("torch.")
