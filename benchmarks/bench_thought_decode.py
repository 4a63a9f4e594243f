"""thought_decode, one new row of every thought over stored keys and values, against FlexAttention, flash attention and SDPA.

The keys of the text and of all thoughts are in one tensor, and so are the values, so that no candidate has to concatenate
them. Ours reads views of these tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.baselines.attention import BASELINES
from benchmarks.baselines.exact import judge_rows
from benchmarks.baselines.packed import Attention, PackedCase
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate, by_back_end
from benchmarks.harness.case import Inputs, Work
from quietstar_kernels import thought_decode

CHECKED = 64  # thoughts whose result is compared


@dataclass(frozen=True, kw_only=True)
class DecodeCase(PackedCase):
    """Attention of row ``step`` of every thought."""

    op: ClassVar[str] = "thought_decode"
    size_names = (*PackedCase.size_names, "step")
    step: int = 13

    @property
    def rows(self) -> int:
        return self.L * self.N

    @property
    def last_row(self) -> int:
        return self.step

    def sees(self, row: Tensor, key: Tensor) -> Tensor:
        L, S = self.L, self.S
        own = (key >= L) & ((key - L) // S == row) & ((key - L) % S <= self.step)
        return ((key < L) & (key <= row // self.N)) | own

    def work(self) -> Work:
        """Attention to the text up to the anchor and to the thought's rows so far. Each of these keys is read once."""
        i = self.step + 1
        flops = 4 * self.K * self.H * self.N * (self.L * (self.L + 1) / 2 + self.L * i)
        numbers = 2 * (self.L * self.N * self.H + self.L * self.N * self.G * i + self.L * self.G) * self.K
        return Work(self.B * flops, self.B * numbers * self.dtype.itemsize)

    def inputs(self, seed: int) -> Inputs:
        keys = (self.B, self.G, self.M, self.K)
        q = self.randn(3 * seed, self.B, self.H, self.rows, self.K)
        return {"q": q, "k": self.randn(3 * seed + 1, *keys), "v": self.randn(3 * seed + 2, *keys)}

    @torch.no_grad()
    def call(self, function: Attention, inputs: Inputs) -> Tensor:
        return function(inputs["q"], inputs["k"], inputs["v"])

    def check(self, function: Attention) -> None:
        """Compare the rows of some thoughts with exact ones."""
        inputs = self.inputs(seed=0)
        some = torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))[:CHECKED].to(self.device)
        judge_rows(self, some, [self.call(function, inputs)], **inputs, grad_out=torch.zeros_like(inputs["q"]))


def ours(case: DecodeCase, backend: str = "auto") -> Attention:
    layout, text_and_own = case.layout, (case.L, case.M - case.L)
    step = torch.tensor(case.step, dtype=torch.int32, device=case.device)
    own = (case.B, case.G, case.rows, case.S, case.K)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (k_text, k_own), (v_text, v_own) = k.split(text_and_own, 2), v.split(text_and_own, 2)
        return thought_decode(q, k_text, v_text, k_own.view(own), v_own.view(own), layout, step, backend=backend)

    return attend


OURS = Candidate("thought_decode", ours, package=PACKAGE)


def candidates(case: DecodeCase) -> list[Candidate]:
    return BASELINES + (by_back_end(case.op, ours) if case.device.type == "cuda" else [])


def cases(device: torch.device, full: bool) -> Iterator[DecodeCase]:
    """The grid, the most important cases first."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    head = DecodeCase(L=256, B=8 if gpu else 1, H=32 if gpu else 8, G=8 if gpu else 2, dtype=dtype, device=device)
    yield head
    for L in [512, 1024, 2048, 4096] if full else [512, 2048] if gpu else [512]:
        yield replace(head, grid="text", L=L)
    for step in (0, 6) if full else (0,):
        yield replace(head, grid="step", step=step)
    for N in (1, 4, 8) if full else (8,):
        yield replace(head, grid="thoughts", N=N)
    if full:
        yield from (replace(head, grid="rows", S=S, step=S - 1) for S in (8, 32))
        yield from (replace(head, grid="width", K=K) for K in (64, 256))
        yield from (replace(head, grid="groups", G=G) for G in (head.H, head.H // 8))


def smoke(device: torch.device) -> list[DecodeCase]:
    """The smallest case that runs every candidate."""
    return [DecodeCase(L=20, S=5, H=4, K=16, step=3, device=device)]


BENCHMARK = Benchmark(DecodeCase.op, OURS, candidates, cases, smoke)
