"""Matrix products of half-precision factors with fp32 sums, by the vendor's library."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b, in out's dtype, fp32 or that of the factors."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a.float() @ b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b, fp32."""
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.float(), b.float())
