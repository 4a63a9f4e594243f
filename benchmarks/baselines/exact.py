"""Attention of a few rows, exactly: what the results of candidates are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import BOUNDS, Wrong, judge


def only_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` [B,H,M,K] in some rows, else 0: with such a gradient of the output, the exact ones take no more than these rows."""
    return torch.zeros_like(x).index_copy(2, rows, x[:, :, rows])


def judge_rows(case: Any, rows: Tensor, got: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> None:
    """Compare some ``rows`` of a case's results, out and with a backward dq, dk and dv, with exact ones.

    Raises:
        Wrong: they differ, or any result is not finite.
    """
    if not all(x.isfinite().all() for x in got):
        raise Wrong("some results are not finite")
    sees = case.sees(rows[:, None], torch.arange(case.M, device=case.device))
    exact = exact_rows(sees, rows, *(x.detach() for x in (q, k, v, grad_out)))
    for name, x, truth in zip(("out", "dq", "dk", "dv"), got, exact, strict=False):
        judge(name, x[:, :, rows] if name in ("out", "dq") else x, truth, BOUNDS[case.dtype])


def exact_rows(
    sees: Tensor, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and dq of some ``rows`` of q [B,H,M,K], and dk, dv if the output's gradient is 0 in all others.

    One head group at a time; in fp64 for fp32 inputs and wider, else in fp32. ``sees`` [rows,M]: the keys of each row.
    """
    dtype, G = torch.float64 if q.dtype.itemsize >= 4 else torch.float32, k.shape[1]
    q, grad_out = (x[:, :, rows].unflatten(1, (G, -1)) for x in (q, grad_out))
    out, dq = torch.empty_like(q, dtype=dtype), torch.empty_like(q, dtype=dtype)
    dk, dv = torch.empty_like(k, dtype=dtype), torch.empty_like(v, dtype=dtype)
    scale = q.shape[-1] ** -0.5
    for b in range(len(k)):
        for g in range(G):
            qg, kg, vg, grad = (x[b, g].to(dtype) for x in (q, k, v, grad_out))
            p = (scale * qg @ kg.T).masked_fill_(~sees, -torch.inf).softmax(-1)
            out[b, g] = p @ vg
            ds = scale * p * (grad @ vg.T - (grad * out[b, g]).sum(-1, keepdim=True))
            dq[b, g], dk[b, g], dv[b, g] = ds @ kg, (ds.transpose(-1, -2) @ qg).sum(0), (p.transpose(-1, -2) @ grad).sum(0)
    return out.flatten(1, 2), dq.flatten(1, 2), dk, dv
