"""Where thought_decode has fewer tiles than the chip has processors: the text in parts, and the sum of the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.triton._attention_forward import LOWEST
from quietstar_kernels.triton._tiles import load_tile, store_tile
from quietstar_kernels.triton.configs import THOUGHT_DECODE_SUM

SMALLEST_PART = 4  # blocks of keys: enough that loads of one hide behind the work on another


def splits_of(tiles: int, L: int, block: int, device: torch.device) -> int:
    """Parts of the text for ``tiles`` programs: as many as fill the chip once, none of less than a few blocks of keys."""
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 8
    return max(1, min(processors // tiles, L // (SMALLEST_PART * block)))


def parts_of(out: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the softmax states of every part, fp32: acc [splits,B,H,P*N,E], top and total [splits,B,H,P*N]; none for one."""
    splits = 0 if splits == 1 else splits
    acc = out.new_empty((splits, *out.shape), dtype=torch.float32)
    return acc, acc.new_empty(acc.shape[:-1]), acc.new_empty(acc.shape[:-1])


def add_parts(acc: Tensor, top: Tensor, total: Tensor, out: Tensor) -> None:
    """``out`` [B,H,P*N,E] from the parts, which are summed in their order."""
    rows, E = top[0].numel(), out.shape[-1]
    config = THOUGHT_DECODE_SUM
    _add_parts[(triton.cdiv(rows, config.blocks["BLOCK_R"]),)](
        acc, top, total, out, rows, len(acc), E=E, BLOCK_E=triton.next_power_of_2(E), **config.options()
    )


@triton.jit(do_not_specialize=["rows", "splits"])
def _add_parts(
    parts, part_tops, part_totals, out, rows, splits, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for _ in tl.range(splits):
        part_top = tl.load(part_tops + row, mask=inside, other=0.0)
        part_total = tl.load(part_totals + row, mask=inside, other=1.0)
        part = load_tile(parts, row * E, inside, E, BLOCK_E)
        new_top = tl.maximum(top, part_top)
        decay, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + part_total * weight
        top = new_top
        part_tops += rows
        part_totals += rows
        parts += rows.to(tl.int64) * E
    store_tile(out, row * E, inside, acc / total[:, None], E, BLOCK_E)
