"""Tile sizes for each kernel and architecture, chosen offline: one table per kernel, and no search at run time.

Those of attention and decoding for sm_90 in 16 bit are the fastest on an H200 (``python -m benchmarks.gpu.tiles``).

A table maps (target, bytes per element, largest width it serves) to a ``Config``; ``pick`` takes the narrowest that fits, and
where a target has none for this size of elements or this width, that of sm_80. The tiles of "interpreter" are small, so that
tests of small inputs cross many tile edges.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
Table = dict[tuple[str, int, int], "Config"]
ANY_SIZE, ANY_WIDTH = 0, 1 << 30


@dataclass(frozen=True, eq=False)
class Config:
    """Block sizes by the names of the kernel's constexprs, and options of the compiler."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return self.blocks | self.compiler()

    def compiler(self) -> dict[str, Any]:
        """Those for the compiler."""
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return chosen | ({} if self.maxnreg is None else {"maxnreg": self.maxnreg})


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


def pick(tables: Table | list[Table], itemsize: int, width: int) -> Config:
    """The config for elements of ``itemsize`` bytes and a ``width``, from the first table that has one for the current target.

    If none has, from the first that has one for sm_80. Raises KeyError if none has.
    """
    for name in (target(), "sm_80"):
        for table in [tables] if isinstance(tables, dict) else tables:
            wanted = id(table), name, itemsize, width
            if wanted not in _picked:
                fit = [x for x in table if x[0] == name and x[1] in (itemsize, ANY_SIZE) and x[2] >= width]
                _picked[wanted] = min(fit, key=lambda x: x[2], default=None)
            if entry := _picked[wanted]:
                return table[entry]
    raise KeyError(f"no tiles for {target()}, {itemsize} bytes per element, width {width}")


_picked: dict[tuple[int, str, int, int], tuple[str, int, int] | None] = {}  # tables are never freed


# BLOCK_M flat rows, a multiple of 16; BLOCK_N text keys in a block without a mask, BLOCK_EDGE in a masked one; SLICES of K,
# which warps share if fp32 queries would fill the registers of one. CAREFUL checks every block for values that aren't finite;
# without it, a tile with such values is computed again, by code that takes registers too. maxnreg=255: without it, the compiler
# spills some registers to raise the occupancy.
ATTENTION_FORWARD: Table = {
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_80", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1, "CAREFUL": 1}, num_warps=8),
    ("sm_80", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 16, "SLICES": 1, "CAREFUL": 1}, num_warps=8),
    ("sm_80", 2, 256): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1, "CAREFUL": 1}, num_warps=8),
    ("sm_80", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("sm_80", 4, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}, num_warps=8),
    ("sm_80", 4, 256): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}, num_warps=8),
    ("sm_90", 2, 64): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1}),
    ("sm_90", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 32, "SLICES": 1}, 4, 3),
    ("sm_90", 2, 256): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 32, "SLICES": 1}, 8, 3),
    ("sm_100", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_EDGE": 32, "SLICES": 1, "CAREFUL": 1}, num_warps=8),
    ("sm_100", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1, "CAREFUL": 1}, num_warps=8),
    ("sm_100", 2, 256): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 32, "SLICES": 1, "CAREFUL": 1}, 8, maxnreg=255),
    ("sm_100", 4, 64): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("sm_100", 4, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 4}, num_warps=8),
    ("gfx942", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("gfx942", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("gfx942", 2, 256): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 4}),
    ("gfx942", 4, 64): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("gfx942", 4, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
}

# For texts of more than LONG_TEXT tokens: edges are a smaller part of a tile's keys.
LONG_TEXT = 1024
ATTENTION_FORWARD_LONG: Table = {
    ("sm_90", 2, 64): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1}),
    ("sm_90", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1}, 4, 3),
}

# In Gluon: two groups of 64 rows, and a ring of STAGES. maxnreg is a third of what three partitions have: see REGISTERS there.
ATTENTION_FORWARD_GLUON: Table = {
    ("sm_90", 2, 64): Config({"BLOCK_N": 128, "BLOCK_EDGE": 32, "STAGES": 3}, maxnreg=168),
    ("sm_90", 2, 128): Config({"BLOCK_N": 128, "BLOCK_EDGE": 32, "STAGES": 2}, maxnreg=168),
}

# With a window, a soft cap or sinks, which take registers.
ATTENTION_FORWARD_OPTIONS: Table = {
    ("sm_90", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1, "CAREFUL": 1}, 4, 3),
    ("sm_90", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1, "CAREFUL": 1}, 8, 3),
    ("sm_90", 2, 256): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1, "CAREFUL": 1}, 8, 3),
}

# On a tree, which takes registers too.
ATTENTION_FORWARD_TREE: Table = {
    ("sm_80", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1, "CAREFUL": 1}, num_warps=8),
    ("sm_90", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1, "CAREFUL": 1}, 8, 3),
    ("sm_90", 2, 256): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1, "CAREFUL": 1}, 8, 3),
    ("sm_100", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 16, "SLICES": 1, "CAREFUL": 1}, num_warps=8),
}

# Passes over rows and anchors, without matrix products.
ATTENTION_BACKWARD_ROWS = Config({"BLOCK_M": 32})
ATTENTION_BACKWARD_RANGES = Config({"BLOCK": 1024})
ATTENTION_BACKWARD_SUM = Config({"BLOCK_R": 4})

# dq: blocks as in ATTENTION_FORWARD.
ATTENTION_BACKWARD_QUERIES: Table = {
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_80", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_stages=3),
    ("sm_80", 2, 256): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_stages=3),
    ("sm_80", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_80", 4, 128): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_80", 4, 256): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}, num_warps=8),
    ("sm_90", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1}, num_warps=8, num_stages=3),
    ("sm_90", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3, maxnreg=128),
    ("sm_90", 2, 192): Config({"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_90", 2, 256): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_100", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1}, 8, 3, maxnreg=255),
    ("sm_100", 2, 256): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("sm_100", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("gfx942", 2, 64): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("gfx942", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("gfx942", 2, 256): Config({"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("gfx942", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("gfx942", 4, 128): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("gfx942", 4, 256): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}, num_warps=8, num_stages=1),
}

# On a tree, which takes registers.
ATTENTION_BACKWARD_QUERIES_TREE: Table = {
    ("sm_80", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_80", 2, 256): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_90", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_90", 2, 256): Config({"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_100", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_100", 2, 256): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
}

# dk and dv: BLOCK_N keys stay, for a loop over BLOCK_M query rows of one head. A third stage hides the loads of the rows.
ATTENTION_BACKWARD_TEXT_KEYS: Table = {
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}),
    ("sm_80", 2, 64): Config({"BLOCK_N": 64, "BLOCK_M": 32, "SLICES": 1}, num_stages=3),
    ("sm_80", 2, 128): Config({"BLOCK_N": 64, "BLOCK_M": 32, "SLICES": 1}, num_warps=8, num_stages=3),
    ("sm_80", 2, 256): Config({"BLOCK_N": 64, "BLOCK_M": 16, "SLICES": 1}, num_warps=8),
    ("sm_80", 4, 64): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}),
    ("sm_80", 4, 128): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 1}),
    ("sm_80", 4, 256): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 8}, num_warps=8),
    ("sm_90", 2, 64): Config({"BLOCK_N": 64, "BLOCK_M": 64, "SLICES": 1}, num_stages=3),
    ("sm_90", 2, 128): Config({"BLOCK_N": 128, "BLOCK_M": 32, "SLICES": 1}, 8, 3),
    ("sm_90", 2, 256): Config({"BLOCK_N": 128, "BLOCK_M": 16, "SLICES": 1}, 8, 3),
    ("sm_90", 4, 64): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}),
    ("sm_90", 4, 128): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 1}, num_warps=8),
    ("sm_100", 2, 128): Config({"BLOCK_N": 128, "BLOCK_M": 32, "SLICES": 1}, num_warps=8, num_stages=3),
    ("sm_100", 2, 256): Config({"BLOCK_N": 128, "BLOCK_M": 16, "SLICES": 1}, num_warps=8),
    ("gfx942", 2, 128): Config({"BLOCK_N": 64, "BLOCK_M": 16, "SLICES": 1}),
    ("gfx942", 2, 256): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}),
    ("gfx942", 4, 64): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}),
    ("gfx942", 4, 128): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 1}),
    ("gfx942", 4, 256): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 8}, num_warps=8, num_stages=1),
}
# In Gluon: a ring of STAGES.
ATTENTION_BACKWARD_KEYS_GLUON: Table = {
    ("sm_90", 2, 64): Config({"STAGES": 3}, maxnreg=168),
    ("sm_90", 2, 128): Config({"STAGES": 2}, maxnreg=168),
}
# For branches of few rows, where Gluon serves: so far counted and compiled, not timed.
ATTENTION_BACKWARD_SHORT_KEYS: Table = {("sm_90", 2, 128): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 1}, 2, 3)}
ATTENTION_BACKWARD_OWN_KEYS: Table = {
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 1}),
    ("sm_80", 2, 128): Config({"BLOCK_N": 32, "BLOCK_M": 32, "SLICES": 1}, num_stages=3),
    ("sm_80", 2, 256): Config({"BLOCK_N": 32, "BLOCK_M": 32, "SLICES": 1}),
    ("sm_80", 4, 64): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}, num_warps=8),
    ("sm_80", 4, 128): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 1}),
    ("sm_80", 4, 256): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 8}, num_warps=8),
    ("sm_90", 2, 128): Config({"BLOCK_N": 64, "BLOCK_M": 16, "SLICES": 1}, num_stages=3),
    ("sm_90", 2, 256): Config({"BLOCK_N": 32, "BLOCK_M": 32, "SLICES": 1}),
    ("sm_90", 4, 64): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}, num_warps=8),
    ("sm_90", 4, 128): Config({"BLOCK_N": 16, "BLOCK_M": 16, "SLICES": 1}, num_warps=8),
    ("gfx942", 2, 256): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}),
    ("gfx942", 4, 64): Config({"BLOCK_N": 32, "BLOCK_M": 16, "SLICES": 1}),
}

# linear_logprob reads fp32 logits whatever the model's dtype: BLOCK_R rows, BLOCK_V ids at a time in a loop along the rows.
ONLINE_SOFTMAX: Table = {
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_R": 32, "BLOCK_V": 256}),
    ("sm_80", 4, ANY_WIDTH): Config({"BLOCK_R": 2, "BLOCK_V": 2048}),
    ("sm_90", 4, ANY_WIDTH): Config({"BLOCK_R": 2, "BLOCK_V": 2048}, maxnreg=128),
}

# The same logits, BLOCK_R x BLOCK_V of them in a program.
LOGITS_GRADIENT: Table = {
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_R": 32, "BLOCK_V": 256}),
    ("sm_80", 4, ANY_WIDTH): Config({"BLOCK_R": 4, "BLOCK_V": 512}),
}

# BLOCK_R rows times BLOCK_V ids (a multiple of 128) in steps of BLOCK_D of the model's width. The width is the number of rows.
# maxnreg=255: without it, the compiler spills some registers to raise the occupancy.
SAMPLE_TOKEN: Table = {
    ("interpreter", ANY_SIZE, 128): Config({"BLOCK_R": 32, "BLOCK_V": 128, "BLOCK_D": 16}),
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_R": 256, "BLOCK_V": 256, "BLOCK_D": 16}),
    ("sm_80", 2, 16): Config({"BLOCK_R": 16, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=8, num_stages=4),
    ("sm_80", 2, ANY_WIDTH): Config({"BLOCK_R": 128, "BLOCK_V": 128, "BLOCK_D": 32}, num_warps=8, num_stages=3),
    ("sm_80", 4, ANY_WIDTH): Config({"BLOCK_R": 32, "BLOCK_V": 128, "BLOCK_D": 16}, num_warps=8, num_stages=3, maxnreg=255),
    ("sm_90", 2, 64): Config({"BLOCK_R": 64, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=4, num_stages=4),
    ("sm_90", 2, ANY_WIDTH): Config({"BLOCK_R": 128, "BLOCK_V": 256, "BLOCK_D": 64}, num_warps=8, num_stages=4),
    ("sm_100", 2, 64): Config({"BLOCK_R": 64, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=4, num_stages=4, maxnreg=255),
    ("sm_100", 2, ANY_WIDTH): Config({"BLOCK_R": 128, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3, maxnreg=255),
    ("gfx942", 2, 16): Config({"BLOCK_R": 16, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=4, num_stages=2),
    ("gfx942", 2, ANY_WIDTH): Config({"BLOCK_R": 64, "BLOCK_V": 128, "BLOCK_D": 32}, num_warps=4, num_stages=2),
    ("gfx942", 4, ANY_WIDTH): Config({"BLOCK_R": 32, "BLOCK_V": 128, "BLOCK_D": 32}, num_warps=4, num_stages=2),
}

# BLOCK_R rows, BLOCK_P parts of the vocabulary in one step.
SAMPLE_TOKEN_CHOICE = Config({"BLOCK_R": 8, "BLOCK_P": 128})

# As in ATTENTION_FORWARD. maxnreg: 128 if two programs then share a processor, 255 if the compiler would spill to use fewer.
THOUGHT_DECODE: Table = {
    ("interpreter", ANY_SIZE, ANY_WIDTH): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_80", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8, maxnreg=128),
    ("sm_80", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("sm_80", 2, 256): Config({"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("sm_80", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_80", 4, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}),
    ("sm_80", 4, 256): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 16}, num_warps=8),
    ("sm_90", 2, 64): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1}, 4, 3),
    ("sm_90", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 4, 3),
    ("sm_90", 2, 256): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
    ("sm_90", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_90", 4, 128): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}, maxnreg=255),
    ("sm_90", 4, 256): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 16}, num_warps=8),
    ("sm_100", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("sm_100", 2, 256): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8, maxnreg=255),
    ("sm_100", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}),
    ("sm_100", 4, 128): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}, maxnreg=255),
    ("gfx942", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8, num_stages=1),
    ("gfx942", 2, 128): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_warps=8),
    ("gfx942", 2, 256): Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_stages=1),
    ("gfx942", 4, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, num_stages=1),
    ("gfx942", 4, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 8}, num_stages=1),
    ("gfx942", 4, 256): Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 16}, num_warps=8, num_stages=1),
}
# With a window, a soft cap or sinks.
THOUGHT_DECODE_OPTIONS: Table = {
    ("sm_90", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 32, "SLICES": 1}, 4, 3),
    ("sm_90", 2, 128): Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3, maxnreg=128),
}
# On a tree, which takes registers.
THOUGHT_DECODE_TREE: Table = {
    ("sm_80", 2, 64): THOUGHT_DECODE["sm_80", 2, 64],
    ("sm_80", 2, 128): THOUGHT_DECODE["sm_80", 2, 128],
    ("sm_80", 2, 256): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}, 4, 3),
    ("sm_100", 2, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3, maxnreg=255),
    ("sm_100", 2, 128): THOUGHT_DECODE["sm_100", 2, 128],
    ("sm_100", 2, 256): Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 16, "SLICES": 1}, 8, 3),
}
THOUGHT_DECODE_SUM = Config({"BLOCK_R": 8})
