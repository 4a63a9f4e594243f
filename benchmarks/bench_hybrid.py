"""Hybrid models: branches through a recurrent layer, the gated delta rule of Qwen3.5, and a GRPO step of a small Qwen3.5 shape.

"headline": N thoughts of S rows at every position of a text. "group": N branches on its last position, as in group RL. Against
a sequence for each branch, which repeats the text, through the functions that transformers calls; and against states, one row
after another. Copies are ready-made, 64 sequences in a call, by length. "decode": one new row of every branch, over what
earlier rows left, against a state for each branch. All take what a layer has: queries and keys are normalised in the clock.
"GRPO" is the benchmark of ``group_rl`` with a Qwen3.5 of random weights.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.llama import random_llama
from benchmarks.bench_group_rl import SEED, STOCK, WHOLE_STEP, GroupCase, no_trl, prepare, shared
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate, not_installed
from benchmarks.harness.case import BOUNDS, Case, Inputs, Work, judge
from quietstar_kernels import DeltaRows, ThoughtLayout, anchor_states, text_states, thought_delta, thought_delta_decode

OP = "hybrid"
BOTH = ("forward", "forward+backward")
TOGETHER = 64  # sequences of a baseline's call
# FLA rounds what its products take to bf16, among it states; its own tests allow 0.02 even in fp16.
DELTA_BOUNDS = BOUNDS | {torch.bfloat16: 0.03}
NAMES = ("out", "dq", "dk", "dv", "dg", "dbeta")
QWEN = "transformers.models.qwen3_5"

# q, k [B,rows,H,K], v [B,rows,H,K], g, beta [B,rows,H] to [B,rows,H,K].
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# As transformers calls it: out, and the final state.
Function = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Repeated:
    """A rule for ordinary sequences, which gets every branch after a copy of its text."""

    rule: Rule


@dataclass(frozen=True, kw_only=True)
class DeltaCase(Case):
    """The rule over a text of L tokens, with N branches of S rows at each of the last P positions."""

    op: ClassVar[str] = OP
    size_names = tuple("LPNSHK")
    rotates: ClassVar[bool] = False  # what a call keeps is larger than the cache
    L: int = 256
    P: int = 256
    N: int = 2
    S: int = 14
    H: int = 4
    K: int = 64

    @cached_property
    def layout(self) -> ThoughtLayout:
        if self.P == self.L:
            return ThoughtLayout.every_position(1, self.L, self.N, self.S, self.device)
        return ThoughtLayout.packed(self.anchors[None], torch.full_like(self.anchors, self.S)[None], self.L)

    @property
    def anchors(self) -> Tensor:
        """int64 [P*N]."""
        return torch.arange(self.L - self.P, self.L, device=self.device).repeat_interleave(self.N)

    @cached_property
    def copies(self) -> list[Tensor]:
        """int64 [n,rows] for each call of a baseline: a branch's text, its rows, and M up to the longest of the call."""
        found = []
        for first in range(0, self.P * self.N, TOGETHER):
            p = self.anchors[first : first + TOGETHER, None]
            branch = first + torch.arange(len(p), device=self.device)[:, None]
            t = torch.arange(int(p.max()) + 1 + self.S, device=self.device)
            own = self.L + branch * self.S + t - p - 1
            found.append(torch.where(t <= p, t, torch.where(t - p <= self.S, own, self.layout.M)))
        return found

    def work(self) -> Work:
        """Of a row and head: the decay, two reads and a write of a state [K,K]. Inputs, output and gradients once."""
        rows, passes = self.layout.M * self.H, 1 + 2 * (self.what == BOTH[1])
        return Work(passes * 7 * rows * self.K**2, passes * 4 * rows * self.K * self.dtype.itemsize)

    def rows(self, seed: int) -> tuple[Tensor, ...]:
        """q, k, v, g, beta and the gradient of the output, of all rows."""
        shape = (1, self.layout.M, self.H)
        q, k, v, grad_out = (self.randn(5 * seed + i, *shape, self.K) for i in range(4))
        g, beta = torch.rand(2, *shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)
        return q, k, v, -0.3 * g, beta.to(self.dtype), grad_out

    def inputs(self, seed: int) -> Inputs:
        packed = self.rows(seed)
        count = torch.cat([rows.flatten() for rows in self.copies]).bincount(minlength=self.layout.M)[: self.layout.M]
        shares = [*packed[:-1], packed[-1] / count[:, None, None]]  # the copies' gradients are added up
        padded = [torch.cat([x[0], torch.zeros_like(x[0, :1])]) for x in shares]
        return {"packed": [packed], "copies": [tuple(x[rows] for x in padded) for rows in self.copies]}

    def call(self, function: Rule | Repeated, inputs: Inputs) -> list[tuple[Tensor, ...]]:
        """out, and with a backward the gradients; of each call with copies for a candidate that takes these."""
        rule, calls = (function.rule, "copies") if isinstance(function, Repeated) else (function, "packed")
        results = []
        for *tensors, grad_out in inputs[calls]:
            if self.what == "forward":
                with torch.no_grad():
                    results.append((rule(*tensors),))
                continue
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = rule(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, grad_out)))
        return results

    def check(self, function: Rule | Repeated) -> None:
        """Compare all rows with those of the reference in fp32."""
        results = self.call(function, self.inputs(seed=0))
        got = self._gathered(results) if isinstance(function, Repeated) else [x[0] for x in results[0]]
        for name, mine, truth in zip(NAMES, got, self._truth, strict=False):
            judge(name, mine, truth, DELTA_BOUNDS[self.dtype])

    @cached_property
    def _truth(self) -> list[Tensor]:
        wide = {"packed": [tuple(x.float() for x in self.rows(seed=0))]}
        return [x.detach()[0] for x in self.call(packed(self, "reference"), wide)[0]]

    def _gathered(self, results: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Results of copies in the shapes of packed ones: the gradients of a row's copies are added up."""
        found = [torch.zeros(self.layout.M + 1, *x.shape[2:], device=self.device) for x in results[0]]
        for rows, result in zip(self.copies, results, strict=True):
            found[0][rows] = result[0].detach().float()
            for to, x in zip(found[1:], result[1:], strict=True):
                to.index_add_(0, rows.flatten(), x.flatten(0, 1).float())
        return [x[:-1] for x in found]


@dataclass(frozen=True, kw_only=True)
class DecodeCase(DeltaCase):
    """Row ``step`` of every branch."""

    size_names = (*DeltaCase.size_names, "step")
    grid: str = "decode"
    step: int = 13

    def work(self) -> Work:
        """As above; what the text's and the branches' rows left is read once."""
        branches = self.P * self.N
        numbers = (self.L + branches * (self.step + 4)) * self.H * 2 * self.K
        return Work(7 * branches * self.H * self.K**2, numbers * 4)

    def inputs(self, seed: int) -> Inputs:
        """The rows of this step; what the rows before them left, and the states that this comes to."""
        *rows, _ = self.rows(seed)
        q, k, v, g, beta = for_op(*rows)
        left = (k, thought_delta(q, k, v, g, beta, self.layout)[1], g)
        text = DeltaRows(*(x[:, :, : self.L] for x in left))
        own = DeltaRows(*(self._branches(x, 2).clone() for x in left))
        chunks = text_states(text, self.layout.lo)
        state = anchor_states(text, chunks, self.layout)
        branches = [self._branches(x, 2) for x in (q, k, v, g, beta)]
        for s in range(self.step):
            thought_delta_decode(*(x[:, :, :, s] for x in branches), text, chunks, state, self.layout, s)
        now = [self._branches(x, 1)[:, :, self.step] for x in rows]
        return {"now": now, "text": text, "chunks": chunks, "own": own, "state": state[0].transpose(0, 1).contiguous()}

    def _branches(self, x: Tensor, dim: int) -> Tensor:
        """The branches' rows of all rows in a dimension."""
        return x.narrow(dim, self.L, self.layout.R).unflatten(dim, (self.P * self.N, self.S))

    @torch.no_grad()
    def call(self, function: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        return function(inputs)

    def check(self, function: Callable[[Inputs], Tensor]) -> None:
        wide = [x.float() for x in self.rows(seed=0)[:-1]]
        truth = self._branches(packed(self, "reference")(*wide), 1)[:, :, self.step]
        judge("out", self.call(function, self.inputs(seed=0)), truth, DELTA_BOUNDS[self.dtype])


@dataclass(frozen=True, kw_only=True)
class TrainerCase(GroupCase):
    """A GRPO step of Qwen3.5: three recurrent layers, then one of attention, whose heads have the same width."""

    op: ClassVar[str] = OP
    grid: str = "GRPO"

    def model(self) -> PreTrainedModel:
        from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

        heads = {"linear_num_key_heads": self.H, "linear_num_value_heads": self.H}
        widths = {"linear_key_head_dim": self.K, "linear_value_head_dim": self.K}
        others = {"max_position_embeddings": self.L + self.T, "pad_token_id": 0, "eos_token_id": 1}
        return random_llama(self, SEED, Qwen3_5ForCausalLM, **heads, **widths, **others)

    @property
    def matrices(self) -> int:
        layers = replace(self, device=torch.device("meta")).model().model.layers
        return sum(x.numel() for x in layers.parameters() if x.ndim == 2)

    def mixing(self, rows: float, pairs: float) -> float:
        return super().mixing(rows, pairs) / 4 + 0.75 * self.layers * 7 * self.K**2 * self.H * rows


def packed(case: DeltaCase, backend: str = "auto") -> Rule:
    layout = case.layout
    return lambda *rows: thought_delta(*for_op(*rows), layout, backend=backend)[0].transpose(1, 2)


def for_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> list[Tensor]:
    """A layer's rows as ``thought_delta`` takes them."""
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q.float(), k.float()))
    return [x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, g, beta)]


def reread(case: DecodeCase) -> Callable[[Inputs], Tensor]:
    layout, step = case.layout, torch.tensor(case.step, dtype=torch.int32, device=case.device)

    def decode(inputs: Inputs) -> Tensor:
        q, k, v, g, beta = for_op(*inputs["now"])
        out, w = thought_delta_decode(q, k, v, g, beta, *(inputs[x] for x in ("text", "chunks", "own")), layout, step)
        for rows, new in zip(inputs["own"], (k, w, g), strict=True):
            rows[:, :, :, case.step] = new
        return out.transpose(1, 2)

    return decode


def repeated(rule: Function) -> Repeated:
    return Repeated(lambda q, k, v, g, beta: rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0])


def with_states(rule: Function) -> Callable[[Inputs], Tensor]:
    """A sequence of one row for each branch, after its state."""

    def decode(inputs: Inputs) -> Tensor:
        q, k, v, g, beta = (x.transpose(0, 1) for x in inputs["now"])
        options = {"initial_state": inputs["state"], "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return rule(q, k, v, g=g, beta=beta, **options)[0].transpose(0, 1)

    return decode


def no_qwen(case: Case) -> str | None:
    return None if importlib.util.find_spec(QWEN) else "this release of transformers has no Qwen3.5"


def no_fla(case: Case) -> str | None:
    return "this kernel is for GPUs" if case.device.type == "cpu" else not_installed("fla-core")


def states(case: DeltaCase) -> Work:
    """What autograd keeps of each row: its state, and what it was made from."""
    return Work(bytes=5 * 4 * case.layout.M * case.H * case.K**2 * (case.what == BOTH[1]))


def by_library(what: str, prepare: Callable[[Function], Any], theirs: str, of_fla: str) -> list[Candidate]:
    """With the PyTorch that transformers takes where FLA isn't installed, and with FLA's function."""

    def transformers(case: Case) -> Any:
        return prepare(inspect.unwrap(getattr(importlib.import_module(f"{QWEN}.modeling_qwen3_5"), theirs)))

    def fla(case: Case) -> Any:
        return prepare(getattr(importlib.import_module("fla.ops.gated_delta_rule"), of_fla))

    return [
        Candidate(f"{what}, transformers' PyTorch", transformers, "transformers", no_qwen),
        Candidate(f"{what}, FLA", fla, "fla-core", no_fla, compiles=True),
    ]


TRL = replace(STOCK, why_not=lambda case: no_trl(case) or no_qwen(case))
SEQUENCES = [
    *by_library("repeated text", repeated, "torch_chunk_gated_delta_rule", "chunk_gated_delta_rule"),
    Candidate("branches through FLA", lambda case: packed(case, "fla"), PACKAGE, no_fla, compiles=True),
    Candidate("sequential states", lambda case: packed(case, "reference"), PACKAGE, needs=states),
]
STATES = by_library("a state per branch", with_states, "torch_recurrent_gated_delta_rule", "fused_recurrent_gated_delta_rule")


def ours(case: Case) -> Callable[..., Any]:
    return {DeltaCase: packed, DecodeCase: reread, TrainerCase: prepare(shared)}[type(case)](case)


def candidates(case: Case) -> list[Candidate]:
    return {DeltaCase: SEQUENCES, DecodeCase: STATES, TrainerCase: [TRL]}[type(case)]


OURS = Candidate("this package", ours, PACKAGE, lambda case: TRL.why_not(case) if isinstance(case, TrainerCase) else None)


def cases(device: torch.device, full: bool) -> Iterator[Case]:
    """The most important cases first."""
    gpu = device.type == "cuda"
    head = DeltaCase(device=device, **({"H": 16, "K": 128, "dtype": torch.bfloat16} if gpu else {}))
    group = replace(head, grid="group", P=1, N=8)
    for case in (head, replace(group, L=512, S=128), replace(group, L=2048, S=256)):
        yield from (replace(case, what=what) for what in BOTH)
    wide = {"layers": 24, "D": 1024, "I": 3072, "H": 16, "G": 4, "width": 128, "V": 151936, "dtype": torch.bfloat16}
    step = TrainerCase(device=device, **(wide if gpu else {}))
    yield DecodeCase(H=head.H, K=head.K, dtype=head.dtype, device=device)
    yield step
    yield replace(step, what=WHOLE_STEP)


def smoke(device: torch.device) -> list[Case]:
    """The smallest cases that run every candidate."""
    sizes = {"L": 40, "P": 40, "S": 3, "H": 2, "K": 8, "device": device}
    small = DeltaCase(**sizes)
    step = TrainerCase(B=2, L=8, C=2, T=6, D=64, I=96, H=2, G=1, V=80, device=device)
    rules = [replace(case, what=what) for case in (small, replace(small, grid="group", P=1, N=3)) for what in BOTH]
    return [*rules, DecodeCase(**sizes, step=2), step, replace(step, what=WHOLE_STEP)]


BENCHMARK = Benchmark(OP, OURS, candidates, cases, smoke)
