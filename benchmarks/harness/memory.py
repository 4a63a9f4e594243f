"""Memory of a call, of the device, and of its cache."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from pathlib import Path

import torch

from benchmarks.harness.clock import Run


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that ``run`` needs beyond what is in use when it starts, at its peak.

    On a GPU this is what PyTorch's allocator counts. On a CPU it is the process's resident memory, sampled every
    millisecond; None without glibc.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    if platform.libc_ver()[0] != "glibc":
        return None
    return _peak_resident(run)


def _peak_resident(run: Run) -> int:
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed would hide this one's
    start = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()  # kept alive, since what it returns counts
        peak = max(peak, resident())
        del result
    finally:
        done.set()
        watcher.join()
    return peak - start


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    kilobytes = next(line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(kilobytes) * 1024


def cache_size(device: torch.device) -> int:
    """Bytes of the last-level cache, which rotating inputs must not fit into."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)
