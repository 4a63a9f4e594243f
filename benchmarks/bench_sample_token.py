"""sample_token, which samples one id per row from the head's softmax, against sampling from a tensor of logits.

The matmul alone, which computes the logits and samples nothing, is a lower bound on the time of any sampler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.baselines.head import SAMPLERS, HeadCase, Sampler
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate, by_back_end
from benchmarks.harness.case import BOUNDS, Inputs, Work, Wrong, judge
from quietstar_kernels import sample_token

DEVIATIONS = 5  # standard errors by which the samples' mean log-probability may differ from minus the entropy
CHECKED = 512  # rows whose result is checked
SEED = 1234


@dataclass(frozen=True, kw_only=True)
class SampleCase(HeadCase):
    """One sampled id for each of R rows."""

    op: ClassVar[str] = "sample_token"

    def work(self) -> Work:
        return Work(2 * self.R * self.D * self.V, (self.R + self.V) * self.D * self.dtype.itemsize + 12 * self.R)

    def inputs(self, seed: int) -> Inputs:
        """The logits have a standard deviation of 2."""
        weight = self.randn(2 * seed + 1, self.V, self.D, deviation=2 * self.D**-0.5)
        return {"hidden": self.randn(2 * seed, self.R, self.D), "weight": weight}

    @torch.no_grad()
    def call(self, function: Sampler, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return function(inputs["hidden"], inputs["weight"])

    def check(self, function: Sampler) -> None:
        """Compare the sampled ids' log-probabilities with exact ones, and their mean over many rows with minus the entropy.

        If a candidate returns logits, compare these.
        """
        inputs = self.inputs(seed=0)
        got = self.call(function, inputs)
        dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        logits = inputs["hidden"][:CHECKED].to(dtype) @ inputs["weight"].to(dtype).T
        if isinstance(got, Tensor):
            return judge("logits", got[:CHECKED], logits, BOUNDS[self.dtype])
        ids, logprob = (x[:CHECKED] for x in got)
        if not ((ids >= 0) & (ids < self.V)).all():
            raise Wrong("an id is outside the vocabulary")
        logp = logits.log_softmax(-1)
        truth = logp.gather(1, ids[:, None])[:, 0]
        judge("logprob", logprob, truth, BOUNDS[self.dtype])
        p = logp.exp()
        mean, square = (p * logp).sum(-1), (p * logp.square()).sum(-1)
        standard_error = (square - mean.square()).sum().sqrt() / len(ids)
        deviation = float((truth - mean).mean().abs() / standard_error)
        if not deviation <= DEVIATIONS:
            raise Wrong(f"the samples' mean log-probability is {deviation:.1f} standard errors from minus the entropy")


def ours(case: SampleCase, backend: str = "auto") -> Sampler:
    row = torch.arange(case.R, dtype=torch.int32, device=case.device)
    counters = torch.stack([row * 0, row, row * 0, row * 0], 1)
    return lambda hidden, weight: sample_token(hidden, weight, counters, SEED, backend=backend)


OURS = Candidate("sample_token", ours, package=PACKAGE)


def candidates(case: SampleCase) -> list[Candidate]:
    return SAMPLERS + (by_back_end(case.op, ours) if case.device.type == "cuda" else [])


def cases(device: torch.device, full: bool) -> Iterator[SampleCase]:
    """The grid, the most important cases first."""
    if device.type == "cuda":
        head = SampleCase(R=4096, D=4096, V=128256, dtype=torch.bfloat16, device=device)
        rows, vocabularies = ([256, 1024, 8192], [32000, 151936]) if full else ([256], [151936])
    else:
        head = SampleCase(R=1024, D=512, V=8192, device=device)
        rows, vocabularies = ([64, 256, 4096], [2048, 32000]) if full else ([64], [32000])
    yield head
    yield from (replace(head, grid="draws", R=R) for R in rows)
    yield from (replace(head, grid="vocabulary", V=V) for V in vocabularies)


def smoke(device: torch.device) -> list[SampleCase]:
    """The smallest case that runs every candidate."""
    return [SampleCase(R=256, D=32, V=300, device=device)]


BENCHMARK = Benchmark(SampleCase.op, OURS, candidates, cases, smoke)
