"""Products of fp32 matrices on CPUs, through the faster of two libraries that PyTorch ships.

PyTorch multiplies with MKL, which uses no AVX-512 on AMD's processors. oneDNN does; PyTorch takes it for bf16, and has an
operator for fp32. Only the processor decides, so that a machine always rounds alike.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

LIBRARIES = {
    "pytorch": "PyTorch's matmul",
    "onednn": "oneDNN",
    "both": "oneDNN, and PyTorch's matmul for the gradients of weights",
}
LEAST = 2**25  # FLOPs; a smaller product takes about as long as oneDNN needs to prepare one


@functools.cache
def library() -> str:
    """Of ``LIBRARIES``, the one that large products go to: QUIETSTAR_CPU_MATMUL's, else the processor's.

    Raises ValueError if QUIETSTAR_CPU_MATMUL names another, or one that this PyTorch lacks.
    """
    has_onednn = torch.backends.mkldnn.is_available()
    named = os.environ.get("QUIETSTAR_CPU_MATMUL", "auto")
    if named not in ("auto", *LIBRARIES):
        raise ValueError(f"QUIETSTAR_CPU_MATMUL must be one of auto, {', '.join(LIBRARIES)}, got {named!r}")
    if named in ("onednn", "both") and not has_onednn:
        raise ValueError(f"QUIETSTAR_CPU_MATMUL is {named}, and this PyTorch has no oneDNN")
    if named != "auto":
        return named
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch lacks it
    if not (has_onednn and str(found.get("cpu_name", "")).startswith("AMD") and found.get("avx512_f")):
        return "pytorch"
    # From Zen 5 on, which has AVX-VNNI as well, AVX-512 has twice AVX2's rate. On Zen 4 it isn't worth packing a transposed
    # factor.
    return "onednn" if found.get("avx_vnni") else "both"


def cpu_products() -> str:
    """One line: which library multiplies large fp32 matrices on CPUs."""
    return f"large fp32 products on CPUs: {LIBRARIES[library()]} (QUIETSTAR_CPU_MATMUL={library()})"


def through_onednn(a: Tensor, columns: int) -> bool:
    """Whether the product of a [...,k] by a matrix of ``columns`` columns goes to oneDNN."""
    if a.dtype != torch.float32 or a.device.type != "cpu" or 2 * a.numel() * columns < LEAST:
        return False
    return library() == "onednn" or (library() == "both" and a.stride(-1) == 1)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [m,k] times b [k,n], both of any strides: in ``out``, unless oneDNN makes a tensor of its own. Not differentiable.

    On GPUs 16-bit factors have a product in fp32.
    """
    if a.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    if through_onednn(a, b.shape[1]):
        return onednn_linear(a, b.T)
    return torch.mm(a, b, out=out)


def add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to [m,n] += a [m,k] times b [k,n]."""
    if a.itemsize == 2:
        torch.addmm(to, a, b, out_dtype=to.dtype, out=to)
    elif through_onednn(a, b.shape[1]):
        to.add_(onednn_linear(a, b.T))
    else:
        to.addmm_(a, b)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [...,k] times the transpose of weight [n,k], plus bias [n], by oneDNN. Not differentiable."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return product


def _dense(x: Tensor) -> Tensor:
    """x or a copy: a matrix that is cut out of a larger one takes oneDNN up to 160 times as long."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()
