"""thought_decode in CUDA, csrc/thought_decode_kernel.cuh: chooses the tile and the parts of the text, and allocates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._options import AttentionOptions
from ..checks import dtype_names
from . import _library

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (64, 128, 256)
PROCESSORS = 132  # to fill, on any device: sums are then split the same way, so that their last bits are equal on all
SMALLEST_PART = 256  # text positions


def serves(dtype: torch.dtype, K: int, E: int) -> str | None:
    """None if this back end serves keys of width K and values of width E in ``dtype``; else the reason, in words."""
    if dtype not in DTYPES:
        return f"it computes in {dtype_names(DTYPES)}, not in {dtype_names([dtype])}"
    if K != E or K not in WIDTHS:
        return f"it serves heads of {', '.join(map(str, WIDTHS))} with keys as wide as values, not K={K}, E={E}"
    return None


def thought_decode(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor, lo: Tensor, table: Tensor, step: Tensor,
    options: AttentionOptions, tree: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Implements ``reference.thought_decode``, for what ``serves`` does not refuse."""
    scale, window, softcap, sinks = options
    B, H, thoughts, K = q.shape
    G, L = k_text.shape[1:3]
    out = q.new_empty((B, H, thoughts, K))
    if out.numel() == 0:
        return out
    rows = thoughts * (H // G)
    tile_rows = rows_of_tile(rows, B * G, K, shared_memory(q.device))
    splits = splits_of(-(-rows // tile_rows) * B * G, L)
    parts = q.new_empty(splits * B * H * thoughts * (K + 1), dtype=torch.float32) if splits > 1 else None
    _library.ops()._thought_decode_cuda(
        *map(in_chunks, (q, k_text, v_text, k_own, v_own)), lo.contiguous(), table.contiguous(),
        None if tree is None else tree.contiguous(), step.int(), None if sinks is None else sinks.float().contiguous(),
        out, parts, scale, window or 0, softcap or 0.0, tile_rows, splits,
    )  # fmt: skip
    return out


def rows_of_tile(rows: int, pairs: int, K: int, shared: int) -> int:
    """Query rows of a tile, 32, 64 or 128, for ``rows`` rows of each of ``pairs`` key heads, in ``shared`` bytes a block."""
    largest = (16384 if shared > 160 * 1024 else 8192) // K
    if rows <= 32:
        wanted = 32
    elif rows * pairs < 128 * PROCESSORS:
        wanted = 64
    else:
        wanted = 128
    return min(wanted, largest, 128)


def splits_of(tiles: int, L: int) -> int:
    """Parts of the text: 1 if ``tiles`` fill the GPU, else enough to fill it twice, but none below ``SMALLEST_PART``."""
    if tiles >= PROCESSORS:
        return 1
    return max(1, min(-(-2 * PROCESSORS // tiles), -(-L // SMALLEST_PART)))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads may use."""
    properties: Any = torch.cuda.get_device_properties(device)  # missing in PyTorch's stub
    return properties.shared_memory_per_block_optin


def in_chunks(x: Tensor) -> Tensor:
    """``x``, or a copy if its rows don't start at multiples of 16 bytes."""
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
