"""What a kernel is compiled for, by the names that ``configs.py`` uses."""

from __future__ import annotations

import functools
from typing import Any

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret


def target() -> str:
    """ "sm_80", "sm_90", "sm_100" or "gfx942" for the current device; "interpreter" if nothing is compiled.

    Other devices get the tiles of one of these that fit: sm_86, sm_89 and sm_120 those of sm_80, which need no more than their
    99 KB of shared memory.
    """
    if INTERPRETED:
        return "interpreter"
    driver = triton.runtime.driver.active
    return _target(driver, driver.get_current_device())


@functools.cache
def _target(driver: Any, device: int) -> str:
    """The target of ``device``, the current device of ``driver``."""
    current = driver.get_current_target()
    if current.backend == "hip":
        return "gfx942"
    if 100 <= current.arch < 120:
        return "sm_100"
    return "sm_90" if current.arch == 90 else "sm_80"


def dot_precision() -> str:
    """``input_precision`` of fp32 dots: three tf32 products come close to fp32, which NVIDIA's matrix units don't have."""
    return "tf32x3" if target().startswith("sm_") else "ieee"
