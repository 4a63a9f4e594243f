"""linear_logprob, forward and backward, against cross entropy over a tensor of logits and against fused linear cross entropies.

All candidates compute the sum of the targets' negative log-probabilities, since some of the baselines compute nothing else. On
a GPU the headline case is that of huggingface/trl#7244: 8192 tokens, width 4096, 151,936 ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.baselines.head import LOSSES, HeadCase, Loss
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate
from benchmarks.harness.case import BOUNDS, Inputs, Work, judge
from quietstar_kernels import linear_logprob
from quietstar_kernels.linear_logprob import default_keep_bytes

CHUNK = 1024  # rows of exact logits at a time


@dataclass(frozen=True, kw_only=True)
class LogprobCase(HeadCase):
    """The loss of R rows."""

    op: ClassVar[str] = "linear_logprob"

    def work(self) -> Work:
        """One matmul in the forward, two in the backward. Both operands are read once, and their gradients written."""
        operands = (self.R + self.V) * self.D * self.dtype.itemsize
        flops = 2 * self.R * self.D * self.V
        return Work(flops, operands) if self.what == "forward" else Work(3 * flops, 3 * operands)

    def inputs(self, seed: int) -> Inputs:
        """The logits have a standard deviation of 2."""
        hidden = self.randn(2 * seed, self.R, self.D)
        weight = self.randn(2 * seed + 1, self.V, self.D, deviation=2 * self.D**-0.5)
        if self.what == "forward+backward":
            hidden.requires_grad_(), weight.requires_grad_()
        targets = torch.randint(self.V, (self.R,), generator=torch.Generator().manual_seed(seed))
        return {"hidden": hidden, "weight": weight, "targets": targets.to(self.device)}

    def call(self, function: Loss, inputs: Inputs) -> tuple[Tensor, ...]:
        operands = inputs["hidden"], inputs["weight"], inputs["targets"]
        if self.what == "forward":
            with torch.no_grad():
                return (function(*operands),)
        loss = function(*operands)
        return (loss, *torch.autograd.grad(loss, (inputs["hidden"], inputs["weight"])))

    def check(self, function: Loss) -> None:
        inputs = self.inputs(seed=0)
        got = self.call(function, inputs)
        exact = self._exact(*(x.detach() for x in inputs.values()))
        for name, x, truth in zip(("loss", "dhidden", "dweight"), got, exact, strict=False):
            judge(name, x, truth, BOUNDS[self.dtype])

    def _exact(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients, one chunk of rows at a time; in fp64 if the case is fp32, else in fp32."""
        dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        loss, dhidden, dweight = weight.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in torch.arange(self.R, device=self.device).split(CHUNK):
            logp = (hidden[rows] @ weight.T).log_softmax(-1)
            loss -= logp.gather(1, targets[rows, None]).sum()
            error = logp.exp_()
            error[torch.arange(len(rows), device=self.device), targets[rows]] -= 1
            dhidden[rows] = error @ weight
            dweight += error.T @ hidden[rows]
        return loss, dhidden, dweight


def ours(case: LogprobCase, **options: Any) -> Loss:
    return lambda hidden, weight, targets: -linear_logprob(hidden, weight, targets, **options).sum()


def _kept(case: LogprobCase) -> int:
    """Bytes of the logits, if the forward keeps them."""
    return case.R * case.V * (4 if case.device.type == "cpu" else case.dtype.itemsize)


def _not_default(case: LogprobCase, keeps: bool) -> str | None:
    """Why ours with options needs no row of its own. ``keeps`` says whether it keeps its logits."""
    if case.what == "forward":
        return "the same as linear_logprob without a backward"
    keeps_by_default = _kept(case) <= default_keep_bytes(case.device)
    return "the default at this size, measured above" if keeps is keeps_by_default else None


OURS = Candidate("linear_logprob", ours, package=PACKAGE)
OURS_OTHERWISE = [
    Candidate(
        "linear_logprob, logits kept",
        lambda case: ours(case, keep_bytes=_kept(case)),
        PACKAGE,
        partial(_not_default, keeps=True),
        lambda case: Work(case.work().flops, _kept(case)),
    ),
    Candidate("linear_logprob, no logits kept", partial(ours, keep_bytes=0), PACKAGE, partial(_not_default, keeps=False)),
]


def candidates(case: LogprobCase) -> list[Candidate]:
    return [*OURS_OTHERWISE, *LOSSES]


def cases(device: torch.device, full: bool) -> Iterator[LogprobCase]:
    """The grid, the most important cases first."""
    if device.type == "cuda":
        head = LogprobCase(R=8192, D=4096, V=151936, dtype=torch.bfloat16, device=device)
        rows, vocabularies = ([1024, 32768], [32000, 128256]) if full else ([], [32000])
    else:
        head = LogprobCase(R=1024, D=512, V=8192, device=device)
        rows, vocabularies = ([256, 4096], [2048, 32000]) if full else ([], [32000])
    for what in ("forward+backward", "forward"):
        yield replace(head, what=what)
    for what in ("forward+backward", "forward") if full else ("forward+backward",):
        yield from (replace(head, grid="targets", what=what, R=R) for R in rows)
        yield from (replace(head, grid="vocabulary", what=what, V=V) for V in vocabularies)


def smoke(device: torch.device) -> list[LogprobCase]:
    """The smallest cases that run every candidate."""
    return [LogprobCase(R=64, D=32, V=300, what=what, device=device) for what in ("forward", "forward+backward")]


BENCHMARK = Benchmark(LogprobCase.op, OURS, candidates, cases, smoke)
