"""thought_attention, forward and backward, against FlexAttention, flash attention joined with each thought's own block, and
SDPA with a dense mask.

Every position of the text thinks, one call has the rows of text and thoughts, and all candidates get the same tensors.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.baselines.attention import BASELINES
from benchmarks.baselines.exact import judge_rows, only_rows
from benchmarks.baselines.packed import Attention, PackedCase
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate, in_gluon
from benchmarks.harness.case import Inputs, Work
from quietstar_kernels import thought_attention
from quietstar_kernels.cpu import _library

CHECKED = 48  # rows of the text, and as many of the thoughts, whose result is compared


@dataclass(frozen=True, kw_only=True)
class AttentionCase(PackedCase):
    """Attention of all packed rows."""

    op: ClassVar[str] = "thought_attention"

    @property
    def rows(self) -> int:
        return self.M

    @property
    def last_row(self) -> int:
        return self.S - 1

    def sees(self, row: Tensor, key: Tensor) -> Tensor:
        L, NS, S = self.L, self.N * self.S, self.S
        anchor = torch.where(row < L, row, (row - L) // NS)
        own = (row >= L) & (key >= L) & ((row - L) // S == (key - L) // S) & (key <= row)
        return ((key < L) & (key <= anchor)) | own

    def work(self) -> Work:
        """FLOPs of the thought rows. Bytes of q, k, v and out; the backward adds those again, grad_out and three gradients."""
        flops = self.B * 2 * self.K * self.H * self.N * self.S * self.L * (self.L + self.S + 2)
        queries, keys = (self.B * heads * self.M * self.K * self.dtype.itemsize for heads in (self.H, self.G))
        forward = 2 * queries + 2 * keys
        if self.what == "forward":
            return Work(flops, forward)
        return Work(3.5 * flops, forward + 4 * queries + 4 * keys)

    def inputs(self, seed: int) -> Inputs:
        shapes = {"q": self.H, "k": self.G, "v": self.G, "grad_out": self.H}
        made = {name: self.randn(4 * seed + i, self.B, h, self.M, self.K) for i, (name, h) in enumerate(shapes.items())}
        if self.what == "forward+backward":
            for name in "qkv":
                made[name].requires_grad_()
        return made

    def call(self, function: Attention, inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (inputs[name] for name in "qkv")
        if self.what == "forward":
            with torch.no_grad():
                return (function(q, k, v),)
        out = function(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), inputs["grad_out"]))

    def check(self, function: Attention) -> None:
        """Compare some rows with exact ones. The output's gradient is 0 in all others, so that the exact result is cheap."""
        inputs, rows = self.inputs(seed=0), self._some_rows()
        inputs["grad_out"] = only_rows(inputs["grad_out"], rows)
        judge_rows(self, rows, self.call(function, inputs), **inputs)

    def _some_rows(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        text = torch.randperm(self.L, generator=generator)[:CHECKED]
        thoughts = torch.randperm(self.M - self.L, generator=generator)[:CHECKED] + self.L
        return torch.cat([text, thoughts, torch.tensor([self.M - 1])]).unique().to(self.device)


def ours(case: AttentionCase) -> Attention:
    layout = case.layout
    return lambda q, k, v: thought_attention(q, k, v, layout)


def beside_a_neighbour(case: AttentionCase) -> Attention:
    """A forward while another process computes as well, which is stopped before and afterwards."""
    attend = ours(case)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    neighbour.send_signal(signal.SIGSTOP)

    def beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        neighbour.send_signal(signal.SIGCONT)
        try:
            return attend(q, k, v)
        finally:
            neighbour.send_signal(signal.SIGSTOP)

    weakref.finalize(beside, neighbour.kill)
    return beside


OURS = Candidate("thought_attention", ours, package=PACKAGE)
IN_GLUON = in_gluon(ours)
NEIGHBOUR = Candidate("one busy neighbour", beside_a_neighbour, PACKAGE)


def candidates(case: AttentionCase) -> list[Candidate]:
    return [NEIGHBOUR] if case.grid == "neighbour" else [IN_GLUON, *BASELINES]


def cases(device: torch.device, full: bool) -> Iterator[AttentionCase]:
    """The grid, the most important cases first."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    head = AttentionCase(L=256, B=8 if gpu else 1, H=32 if gpu else 8, G=8 if gpu else 2, dtype=dtype, device=device)

    def both(make: Callable[..., AttentionCase]) -> Iterator[AttentionCase]:
        return (make(what=what) for what in ("forward", "forward+backward"))

    def vary(grid: str, **changes: Any) -> Iterator[AttentionCase]:
        return both(lambda what: replace(head, grid=grid, what=what, **changes))

    if gpu:  # a long text first, where a kernel is at its best
        yield from vary("text", L=2048, B=1)
    yield from vary("headline")
    if gpu:  # more text than the L2 cache holds
        yield from vary("many pairs", L=2048, B=16, N=1, S=4)
    if not gpu:
        if _library.instruction_set() == "avx512_bf16":  # elsewhere baselines take minutes
            yield from vary("bf16", dtype=torch.bfloat16)
        yield replace(head, grid="neighbour")
    lengths = ([512, 1024, 4096] if full else [512]) if gpu else [64, 128, 512, *([1024, 2048] if full else [])]
    for L in lengths:
        yield from vary("text", L=L, B=max(1, 2048 // L) if gpu else 1)
    if not gpu:
        yield from vary("small heads", B=2, S=12, H=8, G=8, K=64)
    if not gpu:
        head = replace(head, L=128 if full else 64)  # dense masks of more thoughts and rows are slow
    for N in (1, 4, 8) if full else (4,):
        yield from vary("thoughts", N=N)
    for S in (8, 32) if full else (32,):
        yield from vary("rows", S=S)
    for K in (64, 256) if full else (64,):
        yield from vary("width", K=K)
    for G in (head.H, head.H // 8) if full else (head.H,):
        yield from vary("groups", G=G)


def smoke(device: torch.device) -> list[AttentionCase]:
    """The smallest cases that run every candidate."""
    return [AttentionCase(L=12, S=3, H=2, G=1, K=16, what=what, device=device) for what in ("forward", "forward+backward")]


BENCHMARK = Benchmark(AttentionCase.op, OURS, candidates, cases, smoke)
