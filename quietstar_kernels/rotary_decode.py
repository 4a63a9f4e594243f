"""rotary_decode: ``rotary`` for the next row of all branches, whose keys and values go where the attention reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from .checks import INTEGERS, Checker, on_host
from .rotary import check_rotary

_OP = "rotary_decode"


def rotary_decode(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    k_own: Tensor,
    v_own: Tensor,
    step: int | Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``rotary`` of the next row of all C branches, n = C there; keys and values become row ``step`` of k_own and v_own.

    It has no derivative: asking for one raises NotImplementedError.

    Args:
        qkv, k, v, cos, sin, heads, q_weight, k_weight, eps, offset, backend: as in ``rotary``.
        k_own, v_own: [B,G,C,S,K] in qkv's dtype, as ``thought_decode`` takes them; changed in row ``step`` only.
        step: 0 to S-1; an int, or a 0-d int32 or int64 tensor on the same device (one CUDA graph then serves all steps).

    Returns:
        q [B,H,C,K] in qkv's dtype, transposed from [B,C,H,K].

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check = Checker(_OP)
    H, G, eps, offset = check_rotary(check, qkv, k, v, cos, sin, heads, q_weight, k_weight, eps, offset)
    check.sizes |= {"G": G, "C": check["n"]}
    for name, own in (("k_own", k_own), ("v_own", v_own)):
        check.tensor(name, own, "B,G,C,S,K", (qkv.dtype,), qkv.device, "qkv")
        if any(stride == 0 and size > 1 for stride, size in zip(own.stride(), own.shape, strict=True)):
            raise check.fail(f"{name} must not be expanded, got strides {list(own.stride())}")
    check.last_strides_one(k_own=k_own, v_own=v_own)
    S, device = check["S"], qkv.device
    if isinstance(step, Tensor):
        check.tensor("step", step, "", INTEGERS, device, "qkv")
    else:
        step = torch.full((), check.integer("step", step, 0, S - 1, f"from 0 to S-1={S - 1}"), dtype=torch.int32, device=device)
    backend = _dispatch.choose(_OP, backend, device, qkv.dtype, K=check["K"])
    return call(_forward, qkv, k, v, cos, sin, H, G, k_own, v_own, step, q_weight, k_weight, eps, offset, backend)


def _rotary_decode(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, k_own: Tensor, v_own: Tensor,
    step: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, backend: str,
) -> Tensor:  # fmt: skip
    if on_host(step):  # a tensor's value, which torch.compile doesn't know before
        most = k_own.shape[3] - 1
        Checker(_OP).integer("step", int(step), 0, most, f"from 0 to S-1={most}")
    return _dispatch.run(_OP, backend, qkv, k, v, cos, sin, H, G, k_own, v_own, step, q_weight, k_weight, eps, offset)


def _fake(qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, H: int, *_: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], H, cos.shape[-1])).transpose(1, 2)


_forward = operator(_rotary_decode, _fake, instead="rotary has one, in reverse mode", changes=("k_own", "v_own"))
