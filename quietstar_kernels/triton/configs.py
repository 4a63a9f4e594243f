"""Tile sizes per kernel and architecture, chosen offline: one table per kernel, no search at run time.

A table maps (target, bytes per element, widest head or model width it serves) to a ``Config``; ``pick`` takes the narrowest
that fits. "interpreter" tiles are small, so that tests of small inputs cross many tile edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quietstar_kernels.triton._target import target

Table = dict[tuple[str, int, int], "Config"]
ANY_WIDTH = 1 << 30


@dataclass(frozen=True)
class Config:
    """Block sizes by the name of the kernel's constexpr, and what the compiler is told."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return self.blocks | chosen | ({} if self.maxnreg is None else {"maxnreg": self.maxnreg})


def pick(table: Table, itemsize: int, width: int) -> Config:
    """The config of the current target for elements of ``itemsize`` bytes and a ``width``. Raises KeyError if none serves it."""
    here = target()
    widths = sorted(w for name, size, w in table if name == here and size == itemsize and w >= width)
    if not widths:
        raise KeyError(f"no tiles for {here}, {itemsize} bytes per element, width {width}")
    return table[here, itemsize, widths[0]]
