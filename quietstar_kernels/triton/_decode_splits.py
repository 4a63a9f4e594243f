"""Splits the text of thought_decode into parts if there are fewer tiles than processors, and adds up the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.triton._launch import Launch, Plan, cdiv
from quietstar_kernels.triton._softmax import LOWEST
from quietstar_kernels.triton._tiles import load_tile, store_tile
from quietstar_kernels.triton.configs import THOUGHT_DECODE_SUM

SMALLEST_PART = 4  # blocks of keys, enough to load one during the work on another


def splits_of(tiles: int, L: int, block: int, device: torch.device) -> int:
    """Parts of the text for ``tiles`` programs: as many as fill the GPU once, each of at least a few blocks of keys."""
    return max(1, min(processors(device) // tiles, L // (SMALLEST_PART * block)))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units. Without a GPU a few, so that tests have texts in parts."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def parts_of(out: Tensor, splits: int) -> Tensor:
    """Room for the softmax states of all parts of ``out`` [B,H,C,E], fp32: acc [splits,rows,E], top and total [splits,rows].

    One tensor holds them one after another; it is empty if there is one part.
    """
    if splits == 1:
        return out.new_empty(0, dtype=torch.float32)
    rows = out.numel() // out.shape[-1]
    return out.new_empty(splits * (out.numel() + 2 * rows), dtype=torch.float32)


def add_parts(parts: Tensor, splits: int, out: Tensor, known: Plan) -> None:
    """Write ``out``, the sum of its parts in order."""
    rows, E = out[..., 0].numel(), out.shape[-1]
    config = THOUGHT_DECODE_SUM

    def prepare() -> Launch:
        programs = cdiv(rows, config.blocks["BLOCK_R"])
        return Launch(_add_parts, (programs,), (rows, splits), {"E": E, "BLOCK_E": 1 << (E - 1).bit_length()})

    known.launch("parts", config, (parts, out), prepare)


@triton.jit(do_not_specialize=["rows", "splits"])
def _add_parts(parts, out, rows, splits, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    all_rows = splits.to(tl.int64) * rows
    tops = parts + all_rows * E
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for _ in tl.range(splits):
        part_top = tl.load(tops + row, mask=inside, other=0.0)
        part_total = tl.load(tops + all_rows + row, mask=inside, other=1.0)
        part = load_tile(parts, row * E, inside, E, BLOCK_E)
        new_top = tl.maximum(top, part_top)
        decay, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + part_total * weight
        top = new_top
        tops += rows
        parts += rows.to(tl.int64) * E
    store_tile(out, row * E, inside, acc / total[:, None], E, BLOCK_E)
