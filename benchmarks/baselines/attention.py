"""What computes attention of text and thoughts without ``thought_attention`` and ``thought_decode``."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.baselines.flash_prefix import flash_prefix
from benchmarks.baselines.packed import Attention, PackedCase
from benchmarks.harness.candidate import Candidate
from benchmarks.harness.case import Work

MOST_ROWS_EAGER = 1 << 14  # beyond this ``create_block_mask`` is compiled, as it would otherwise make the whole M x M mask


def dense(case: PackedCase) -> Attention:
    """SDPA at its best: the mask is additive, which SDPA would otherwise make it, and shared by the whole batch."""
    row, key = (torch.arange(size, device=case.device) for size in (case.rows, case.M))
    mask = torch.zeros(case.rows, case.M, dtype=case.dtype, device=case.device)
    for chunk in row.split(1024):
        mask[chunk] = mask[chunk].masked_fill_(~case.sees(chunk[:, None], key), -math.inf)
    return partial(scaled_dot_product_attention, attn_mask=mask[None, None], enable_gqa=case.H != case.G)


def dense_needs(case: PackedCase) -> Work:
    scores = case.rows * case.M
    backward = 3.5 if case.what == "forward+backward" else 1
    return Work(4 * case.B * case.H * case.K * scores * backward, scores * case.dtype.itemsize)


def flex(case: PackedCase, options: dict[str, Any] | None = None) -> Attention:
    """Compiled for this shape only, as in the documentation of ``flex_attention``."""
    torch._dynamo.reset()
    make = create_block_mask if max(case.rows, case.M) <= MOST_ROWS_EAGER else torch.compile(create_block_mask)

    def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return case.sees(row, key)

    block_mask = make(mask, None, None, case.rows, case.M, device=case.device.type)
    attend = torch.compile(flex_attention, dynamic=False)
    return partial(attend, block_mask=block_mask, enable_gqa=case.H != case.G, kernel_options=options)


def no_flex_backward(case: PackedCase) -> str | None:
    if case.device.type == "cpu" and case.what == "forward+backward":
        return "FlexAttention has no backward on CPUs"
    return None


def no_flex_flash(case: PackedCase) -> str | None:
    if case.device.type != "cuda":
        return "this kernel is for GPUs"
    if not (find_spec("flash_attn") and find_spec("flash_attn.cute")):
        return "flash_attn.cute, which this back end calls, is not installed here"
    return None if find_spec("cutlass") else "nvidia-cutlass-dsl, which flash_attn.cute needs, is not installed here"


def no_flash_prefix(case: PackedCase) -> str | None:
    if case.device.type == "cuda" and case.dtype == torch.float32:
        return "flash attention on GPUs supports only fp16 and bf16"
    return None


BASELINES = [
    Candidate("FlexAttention, compiled", flex, why_not=no_flex_backward, compiles=True),
    Candidate(
        "FlexAttention, FLASH", partial(flex, options={"BACKEND": "FLASH"}), "flash-attn-4", no_flex_flash, compiles=True
    ),
    Candidate("flash prefix + own block (PyTorch)", flash_prefix, why_not=no_flash_prefix),
    Candidate("SDPA, dense mask", dense, needs=dense_needs),
]
