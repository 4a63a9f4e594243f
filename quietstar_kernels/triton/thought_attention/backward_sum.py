"""Last step of thought_attention's backward: adds the parts of the text's dk and dv, in order, into dk and dv."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.triton._launch import Launch, Plan, cdiv
from quietstar_kernels.triton._tiles import load_tile, padded, store_tile
from quietstar_kernels.triton.configs import ATTENTION_BACKWARD_SUM


def add_parts(dk_parts: Tensor, dv_parts: Tensor, dk: Tensor, dv: Tensor, known: Plan) -> None:
    """The first L rows of dk [B,G,M,K] and dv [B,G,M,E] from fp32 [parts,B,G,L,K] and [parts,B,G,L,E]; all contiguous."""
    parts, B, G, L, K = dk_parts.shape
    M, E = dv.shape[2:]
    config = ATTENTION_BACKWARD_SUM

    def prepare() -> Launch:
        programs = cdiv(L, config.blocks["BLOCK_R"]) * B * G
        constants = {"K": K, "E": E, "BLOCK_K": padded(K), "BLOCK_E": padded(E)}
        return Launch(attention_backward_sum, (programs,), (parts, B * G, L, M), constants)

    known.launch("sum", config, (dk_parts, dv_parts, dk, dv), prepare)


@triton.jit(do_not_specialize=["parts", "pairs", "L", "M"])
def attention_backward_sum(
    dk_parts, dv_parts, dk, dv, parts, pairs, L, M,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    n0 = tl.program_id(0) // pairs * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    inside = n0 + i < L
    dk_sum = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    dv_sum = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for part in tl.range(parts):
        first = (part * pairs + pair) * L + n0
        dk_sum += load_tile(dk_parts + first * K, i * K, inside, K, BLOCK_K)
        dv_sum += load_tile(dv_parts + first * E, i * E, inside, E, BLOCK_E)
    first = pair * M + n0
    store_tile(dk + first * K, i * K, inside, dk_sum, K, BLOCK_K)
    store_tile(dv + first * E, i * E, inside, dv_sum, E, BLOCK_E)
