"""What the Gluon kernels for Hopper have in common: when they run, their descriptors, and rings of shared memory.

Gluon is the part of Triton in which a kernel names its warp groups, copies and barriers itself. ``triton.experimental.gluon``
is imported by this module and by the kernels, and only where they run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction

from . import _device
from ._device import LOG2_E
from ._launch import steps

GROUP = gl.constexpr(64)  # rows or keys of a warp group
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
# The latter are names of Triton 3.6.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
wait_for_group = getattr(gl, "barrier", None) or gl.thread_barrier


def with_layouts(function: JITFunction) -> Any:
    """A device function of Triton's kernels, for Gluon: its operations then keep the layouts of their arguments.

    The function may not make tensors of its own, as Gluon must be told their layouts.
    """
    return gluon.jit(function.fn)


turn_of = with_layouts(_device.turn_of)
tile_start = with_layouts(_device.tile_start)
seen_by = with_layouts(_device.seen_by)
first_node = with_layouts(_device.first_node)
keys_of_node = with_layouts(_device.keys_of_node)
on_path = with_layouts(_device.on_path)
bounds = with_layouts(_device.bounds)
window_bounds = with_layouts(_device.window_bounds)
cover = with_layouts(_device.cover)
edge_block = with_layouts(_device.edge_block)
in_range = with_layouts(_device.in_range)
without_poison = with_layouts(_device.without_poison)
bend = with_layouts(_device.bend)
row_tile = with_layouts(_device.row_tile)


@gluon.jit
def weights(qk, lse, scale, softcap, dtype: gl.constexpr):
    """As ``_device.weights``."""
    if softcap is None:
        x, factor, slope = qk, scale * LOG2_E, 1.0
    else:
        x = bend(qk * (scale / softcap), dtype)
        factor, slope = softcap * LOG2_E, 1 - x * x
    return gl.exp2(gl.fma(x, factor, -lse)), slope


@gluon.constexpr_function
def LINES(K):
    """The layout of a warp group that reads and writes whole rows of K."""
    return gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])


@gluon.jit
def put(numbers, i, value):
    """Store an integer in shared memory, int64 [.., 1]."""
    numbers.index(i).store(gl.full([1], value, gl.int64, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def number(numbers, i):
    """The integer that ``put`` has stored."""
    return gl.max(numbers.index(i).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


class Place(NamedTuple):
    """Where a partition is in a ring: a slot, and the parity of how often it went round."""

    slot: Any
    phase: Any


@gluon.jit
def after(place, SLOTS: gl.constexpr):
    """The next ``Place`` of a ring of SLOTS."""
    last = place.slot == SLOTS - 1
    return Place(gl.where(last, 0, place.slot + 1), gl.where(last, place.phase ^ 1, place.phase))


@gluon.jit
def barriers(SLOTS: gl.constexpr, COUNT: gl.constexpr):
    """A barrier for each of SLOTS, whose phase ends when COUNT have arrived."""
    made = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(made.index(slot), count=COUNT)
    return made


def described(x: Tensor, heads: int, rows: int) -> TensorDescriptor:
    """x [B,heads,M,width] in tiles of ``rows`` rows of ``heads`` heads."""
    block = [1, heads, rows, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), [*steps(x), 1], block, layout)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at once, one on each multiprocessor; those of an H100 if nothing is launched."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
