"""Memory of a training step on a long text: anchors in chunks against all at once.

Rollout, forward and backward of a text where every 16th position thinks, with a small Mistral whose sliding window makes 32k
tokens possible on a CPU. Both candidates must give the same loss and gradients. Each is timed once, on a GPU after a run that
compiles, since the benchmark is about memory. The grid "chunk" varies the size of the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate
from benchmarks.harness.case import BOUNDS, Case, Inputs, Work, judge
from benchmarks.harness.compare import Conditions, Row, blank, fill, run_once
from quietstar import QuietStar, ThoughtConfig

SEED = 0
Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # maps a text [B,L] to its loss and all gradients in one vector


@dataclass(frozen=True, kw_only=True)
class MemoryCase(Case):
    """One text of L tokens, with anchors in chunks of C. Attention looks ``window`` positions back."""

    op: ClassVar[str] = "memory"
    size_names = ("L", "P", "C", "N", "T", "J", "layers", "D", "K", "V")
    rotates: ClassVar[bool] = False
    what: str = "training step"
    L: int
    C: int = 64
    every: int = 16
    N: int = 4
    T: int = 4
    J: int = 2
    layers: int = 1
    D: int = 32
    K: int = 16
    V: int = 256
    window: int = 512

    @property
    def P(self) -> int:
        """The anchors."""
        return self.L // self.every

    def work(self) -> Work:
        """Matmuls of the packed forward and backward. What chunks recompute does not count."""
        thoughts = self.P * self.N
        rows = self.L + thoughts * (self.T + self.J + 1)
        matrices = self.layers * (4 * self.D * self.K + 9 * self.D**2)
        attention = self.layers * 4 * self.K * rows * min(self.window, self.L / 2)
        predicted = self.L + thoughts * (self.T + self.J)
        return Work(3 * (2 * rows * matrices + attention + 2 * predicted * self.D * self.V))

    def inputs(self, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(self.V, (1, self.L), generator=generator).to(self.device)}

    def call(self, function: Step, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return function(inputs["input_ids"])


def make_step(case: MemoryCase, chunk: int | None) -> Step:
    torch.manual_seed(SEED)
    config = MistralConfig(
        vocab_size=case.V,
        hidden_size=case.D,
        intermediate_size=3 * case.D,
        num_hidden_layers=case.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=case.K,
        initializer_range=case.D**-0.5,
        sliding_window=case.window,
    )
    thoughts = ThoughtConfig(thoughts=case.N, thought_tokens=case.T, lookahead=case.J, policy_weight=1.0, embedding_scale=1.0)
    qs = QuietStar(MistralForCausalLM(config).to(case.device), thoughts).train()
    torch.nn.init.normal_(qs.mixing_head[-1].weight, std=0.1)
    qs.anchor_chunk = chunk
    anchors = torch.arange(case.every - 1, case.L, case.every, device=case.device)[None]

    def step(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        loss = qs(input_ids, anchors=anchors, seed=SEED).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in qs.parameters()])
        qs.zero_grad()
        return loss.detach(), gradients

    return step


def compare(case: MemoryCase, ours: Candidate, baselines: Sequence[Candidate], conditions: Conditions) -> list[Row]:
    """A row for each candidate, from a single run.

    Raises:
        Wrong: the losses or gradients differ.
    """
    inputs, rows, truth = case.inputs(seed=1), [], None
    for candidate in (ours, *baselines):
        rows.append(row := blank(case, candidate, is_ours=candidate is ours))
        step = candidate.prepare(case)
        if case.device.type == "cuda":
            case.call(step, inputs)
        found, seconds, row.peak_bytes = run_once(case, step, inputs)
        fill(row, case, conditions.rates, seconds)
        row.rounds, row.times_ours = 1, seconds / rows[0].seconds
        truth = truth or found
        for what, got, exact in zip(("loss", "gradient"), found, truth, strict=True):
            judge(f"{candidate.name}: {what}", got, exact, BOUNDS[case.dtype])
    return rows


OURS = Candidate("anchors in chunks of C", lambda case: make_step(case, case.C), package=PACKAGE)
WHOLE = Candidate("all anchors at once", partial(make_step, chunk=None), package=PACKAGE)


def candidates(case: MemoryCase) -> list[Candidate]:
    return [] if case.grid == "chunk" else [WHOLE]


def cases(device: torch.device, full: bool) -> Iterator[MemoryCase]:
    """The grid, the most important cases first."""
    long = MemoryCase(L=32768, device=device)
    yield long
    for L in (8192, 16384):
        yield replace(long, grid="text", L=L)
    for C in (16, 256, 1024) if full else (16, 256):
        yield replace(long, grid="chunk", L=8192, C=C)


def smoke(device: torch.device) -> list[MemoryCase]:
    """The smallest case that runs every candidate."""
    return [MemoryCase(L=48, C=2, N=2, T=2, V=80, window=16, device=device)]


BENCHMARK = Benchmark(MemoryCase.op, OURS, candidates, cases, smoke, compare)
