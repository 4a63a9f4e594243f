"""Attention of text and thoughts put together from existing parts: a flash attention of all rows to the text, and plain matmuls
of each thought's own rows, joined by their log-sum-exp (LSE)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.packed import Attention, PackedCase


def flash_prefix(case: PackedCase) -> Attention:
    """For one s, the rows s of all anchors see a causal triangle of the text. So the S rows of N thoughts are passed to the
    flash attention as additional query heads.
    """
    flash = CPUFlash if case.device.type == "cpu" else GPUFlash
    merge = partial(_Merged.apply, flash, case.B, case.L, case.N)
    return lambda q, k, v: merge(q, k, v, case.S, case.last_row)


class CPUFlash:
    """PyTorch's flash attention on CPUs: q [b,h,L,K] over k, v [b,1,L,K]."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return out, lse, ()

    @staticmethod
    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple) -> tuple:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = op(grad_out, q, k, v, out, lse, 0.0, True)
        return dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)


class GPUFlash:
    """PyTorch's flash attention on GPUs, which supports grouped heads."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        return out, lse, tuple(rest[:6])

    @staticmethod
    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple) -> tuple:
        *lengths, seed, offset = rest
        op = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return op(grad_out, q, k, v, out, lse, *lengths, 0.0, True, seed, offset)


class _Merged(torch.autograd.Function):
    """The attention of ``flash_prefix``. The gradient of each part needs only the joint output and LSE."""

    @staticmethod
    def forward(ctx: Any, flash: Any, B: int, L: int, N: int, q: Tensor, k: Tensor, v: Tensor, S: int, step: int) -> Tensor:
        heads = _Heads(B, L, N, S, q.shape[1], k.shape[1], rows=q.shape[2])
        k_text, v_text = (heads.text_keys(x) for x in (k, v))
        fold = heads.fold(q)
        out, lse, rest = flash.forward(fold, k_text, v_text)
        own_q, own_k, own_v = heads.own_rows(q), heads.own_keys(k), heads.own_keys(v)
        scores = _own_scores(own_q, own_k, step)
        own_lse = scores.logsumexp(-1)
        own_out = torch.exp(scores - own_lse[..., None]).to(q.dtype) @ own_v
        text_out, text_lse = heads.thoughts(out), heads.thoughts(lse[..., None])[..., 0].float()
        share = torch.sigmoid(own_lse - text_lse)[..., None].to(q.dtype)
        joint_out, joint_lse = text_out.lerp(own_out, share), torch.logaddexp(text_lse, own_lse)
        whole = heads.unfold(out, joint_out)
        ctx.save_for_backward(q, k, v, whole, lse, joint_lse, *(x for x in rest if isinstance(x, Tensor)))
        ctx.rest, ctx.flash, ctx.heads, ctx.step = rest, flash, heads, step
        return whole

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        q, k, v, whole, lse, joint_lse, *kept = ctx.saved_tensors
        heads, kept = ctx.heads, iter(kept)
        rest = tuple(next(kept) if isinstance(x, Tensor) else x for x in ctx.rest)
        k_text, v_text = (heads.text_keys(x) for x in (k, v))
        folded_lse = heads.fold_lse(lse, joint_lse)
        dq_text, dk_text, dv_text = ctx.flash.backward(
            heads.fold(grad_out), heads.fold(q), k_text, v_text, heads.fold(whole), folded_lse, rest
        )
        own_q, own_k, own_v = heads.own_rows(q), heads.own_keys(k), heads.own_keys(v)
        grad, out = heads.own_rows(grad_out), heads.own_rows(whole)
        p = torch.exp(_own_scores(own_q, own_k, ctx.step) - joint_lse[..., None])
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        ds = (p * ((grad @ own_v.transpose(-1, -2)).float() - delta) * q.shape[-1] ** -0.5).to(q.dtype)
        dq_own, dk_own = ds @ own_k, ds.transpose(-1, -2) @ own_q
        dv_own = p.to(q.dtype).transpose(-1, -2) @ grad
        dq = heads.unfold(dq_text, heads.thoughts(dq_text) + dq_own)
        dk, dv = (heads.join_keys(text, own) for text, own in ((dk_text, dk_own), (dv_text, dv_own)))
        return None, None, None, None, dq, dk, dv, None, None


def _own_scores(q: Tensor, k: Tensor, step: int) -> Tensor:
    """fp32 [...,rows,S] of a thought's own rows, the last of which is row ``step``; -inf where a row doesn't see the key."""
    rows, S = q.shape[-2], k.shape[-2]
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    row, key = torch.arange(step + 1 - rows, step + 1, device=q.device), torch.arange(S, device=q.device)
    return scores.masked_fill_(key > row[:, None], -math.inf)


class _Heads:
    """Turns packed rows into heads over the L anchors: for each key head, h query heads times the s rows of N thoughts."""

    def __init__(self, B: int, L: int, N: int, S: int, H: int, G: int, rows: int):
        self.B, self.L, self.N, self.S, self.G, self.h = B, L, N, S, G, H // G
        self.packed = rows == L + L * N * S  # text rows first; otherwise one row per thought
        self.s = S if self.packed else 1

    def fold(self, x: Tensor) -> Tensor:
        """[B,H,rows,K] to [B*G,h*N*s (+h),L,K]: thought rows as heads, then text rows."""
        B, L, N, G, h, s = self.B, self.L, self.N, self.G, self.h, self.s
        x = x.reshape(B * G, h, *x.shape[2:])
        thoughts = x[:, :, L * self.packed :].unflatten(2, (L, N * s)).transpose(2, 3).flatten(1, 2)
        return torch.cat([thoughts, x[:, :, :L]], 1) if self.packed else thoughts.contiguous()

    def thoughts(self, folded: Tensor) -> Tensor:
        """The thought rows of ``fold`` as [B*G,h,L,N,s,K]."""
        count = self.h * self.N * self.s
        return folded[:, :count].unflatten(1, (self.h, self.N, self.s)).permute(0, 1, 4, 2, 3, 5)

    def unfold(self, folded: Tensor, thoughts: Tensor) -> Tensor:
        """[B,H,rows,K] from the text rows of ``folded`` and from ``thoughts``."""
        rows = thoughts.flatten(2, 4)
        if self.packed:
            rows = torch.cat([folded[:, self.h * self.N * self.s :], rows], 2)
        return rows.reshape(self.B, self.G * self.h, *rows.shape[2:])

    def fold_lse(self, folded: Tensor, joint: Tensor) -> Tensor:
        """``folded`` [B*G,heads,L] with the joint LSE [B*G,h,L,N,s] for the thought rows, in the same memory layout."""
        out = folded.clone()  # keeps the strides
        count = self.h * self.N * self.s
        out[:, :count] = joint.permute(0, 1, 3, 4, 2).flatten(1, 3)
        return out

    def text_keys(self, x: Tensor) -> Tensor:
        """[B*G,1,L,K]."""
        return x[:, :, : self.L].reshape(self.B * self.G, 1, self.L, -1)

    def own_keys(self, x: Tensor) -> Tensor:
        """[B*G,1,L,N,S,K]."""
        return x[:, :, self.L :].reshape(self.B * self.G, 1, self.L, self.N, self.S, -1)

    def own_rows(self, x: Tensor) -> Tensor:
        """[B*G,h,L,N,s,K]."""
        x = x[:, :, self.L * self.packed :]
        return x.reshape(self.B * self.G, self.h, self.L, self.N, self.s, -1)

    def join_keys(self, text: Tensor, own: Tensor) -> Tensor:
        """Gradients of the text's keys [B*G,1,L,K] and of the thoughts' own keys [B*G,h,L,N,S,K] as [B,G,M,K]."""
        own = own.sum(1, keepdim=True).flatten(2, 4)
        return torch.cat([text, own], 2).view(self.B, self.G, -1, text.shape[-1])
