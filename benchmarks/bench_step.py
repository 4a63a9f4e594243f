"""A whole training step and a whole rollout of a model, ours against the published code's schedule.

A training step samples thoughts at all positions, runs the packed forward and backward, and updates with AdamW. The roofline
counts the matmuls of these three passes, and the second forward of checkpointed layers. The optimizer and everything else that
is not a matmul show up as distance from it. The grid "passes" varies the number of sampled tokens T, to compare the schedules'
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.baselines.llama import LLAMA_8B, QWEN3_600M, LlamaCase, random_llama
from benchmarks.baselines.published_schedule import PublishedSchedule
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate, not_installed
from benchmarks.harness.case import Inputs, Work, judge
from quietstar import QuietStar, ThoughtConfig, fast_linear
from quietstar.hf.fused_layers import FusedLayer
from quietstar_kernels.cpu import products

SEED = 1
LORA_RANK = 16
# Grids with a case of a real model's shape each. All layers of one take minutes to compile.
SMALLEST, FOUR_LAYERS, LARGEST = "0.6B", "0.6B, four layers", "Llama 8B, LoRA"
# For whole models, since rounding accumulates over the layers and the policy term has a factor of 1e6.
STEP_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True, kw_only=True)
class StepCase(LlamaCase):
    """A training step or a rollout of a Llama.

    Attributes:
        lora: whether the model's weights are frozen and low-rank updates of q and v are trained instead.
        checkpointing: whether to use gradient checkpointing.
    """

    op: ClassVar[str] = "step"
    size_names = ("B", "L", "N", "T", "J", "layers", "D", "H", "G", "V")
    what: str = "training step"
    B: int = 1
    L: int
    N: int = 2
    T: int = 9
    J: int = 4
    lora: bool = False
    checkpointing: bool = False

    def work(self) -> Work:
        """Matmuls of the rollout; in a training step also those of the packed forward, the backward, and the second forward of
        checkpointed layers."""
        rows, predicted = self.L * (1 + self.N * self.T), self.L * self.N * self.T
        layers, head = self._forward(rows, self.T, predicted)
        if self.what == "rollout":
            return Work(layers + head, (self.T + 1) * self._weights())
        S = self.T + self.J + 1
        packed_layers, packed_head = self._forward(self.L * (1 + self.N * S), S, predicted + self.L * (1 + self.N * self.J))
        passes = 2 if self.lora else 3  # frozen weights have no gradient
        again = 1 if self.checkpointing else 0
        flops = layers + head + (passes + again) * packed_layers + passes * packed_head
        return Work(flops, (self.T + 1 + passes + again) * self._weights())

    def _forward(self, rows: int, S: int, predicted: int) -> tuple[float, float]:
        """FLOPs of the layers, for thoughts of S rows, and of the head."""
        attention = self.layers * 2 * self.K * self.H * (self.N * S * self.L * (self.L + S + 2) + self.L * (self.L + 1))
        return self.B * (2 * rows * self.matrices + attention), self.B * 2 * predicted * self.D * self.V

    def _weights(self) -> int:
        """Bytes."""
        return (self.matrices + self.D * self.V) * self.dtype.itemsize

    def to_compile(self) -> StepCase:
        return replace(self, layers=1, B=min(self.B, 2))

    def inputs(self, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(self.V, (self.B, self.L), generator=generator).to(self.device)}

    def call(self, function: Callable[[Tensor], Tensor], inputs: Inputs) -> Tensor:
        return function(inputs["input_ids"])

    def check(self, function: TrainingStep | Rollout) -> None:
        """Compare loss, rewards and gradients of a short text with given thoughts; for a rollout, the log-probabilities."""
        L = min(self.L, 12)
        ids = self.inputs(seed=0)["input_ids"][:1, :L]
        thoughts = torch.randint(self.V, (1, L, self.N, self.T), generator=torch.Generator().manual_seed(0)).to(self.device)
        truth = self.wrapped(QuietStar)  # with a model of its own, since a candidate may have changed its layers
        truth.load_state_dict(function.qs.state_dict())
        bound = STEP_BOUNDS[self.dtype]
        if self.what == "rollout":
            mine, exact = (qs.think(ids, seed=SEED, greedy=False) for qs in (function.qs, truth))
            return judge("log-probabilities", mine.logprob, exact.logprob, bound)
        mine, exact = (qs(ids, thought_ids=thoughts) for qs in (function.qs, truth))
        judge("loss_ce", mine.loss_ce, exact.loss_ce, bound)
        judge("rewards", mine.reward, exact.reward, bound)
        both = ((mine, function.qs), (exact, truth))
        grads = [torch.autograd.grad(out.loss_ce, [p for p in qs.model.parameters() if p.requires_grad]) for out, qs in both]
        judge("gradient", *(torch.cat([x.flatten().float() for x in side]) for side in grads), bound)

    def model(self) -> PreTrainedModel:
        model = random_llama(self, SEED)
        if self.lora:
            model.requires_grad_(False)
            for layer in model.model.layers:
                layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
                layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj)
        return model

    def wrapped(self, schedule: type[QuietStar]) -> QuietStar:
        config = ThoughtConfig(thoughts=self.N, thought_tokens=self.T, lookahead=self.J, embedding_scale=1)
        qs = schedule(self.model(), config).train()
        nn.init.normal_(qs.mixing_head[-1].weight, std=0.1)  # it starts at zero, where all rewards would be rounding errors
        if self.checkpointing:
            qs.gradient_checkpointing_enable()
        return qs


class LowRank(nn.Module):
    """A frozen linear layer plus the trained product of two thin matrices (LoRA, arXiv 2106.09685)."""

    def __init__(self, frozen: nn.Linear):
        super().__init__()
        self.frozen = frozen
        like = {"bias": False, "device": frozen.weight.device, "dtype": frozen.weight.dtype}
        self.down = nn.Linear(frozen.in_features, LORA_RANK, **like)
        self.up = nn.Linear(LORA_RANK, frozen.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class TrainingStep:
    """Loss, backward and AdamW of a batch."""

    def __init__(self, qs: QuietStar):
        self.qs = qs
        self.optimizer = torch.optim.AdamW([p for p in qs.parameters() if p.requires_grad], lr=1e-6)

    def __call__(self, input_ids: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.qs(input_ids, seed=SEED).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Rollout:
    """The sampled thoughts of a batch."""

    def __init__(self, qs: QuietStar):
        self.qs = qs

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.qs.think(input_ids, seed=SEED, greedy=False).thought_ids


def prepare(schedule: type[QuietStar]) -> Callable[[StepCase], TrainingStep | Rollout]:
    return lambda case: (Rollout if case.what == "rollout" else TrainingStep)(case.wrapped(schedule))


def kept_by_passes(case: StepCase) -> Work:
    """What all passes keep for the backward: about 17 D numbers per row and layer, and new keys and values for each pass."""
    passes = case.T + case.J + 2
    rows = case.B * case.N * case.L * passes
    keys = case.B * case.N * case.L * passes * (passes + 1) / 2 * 2 * case.G * case.K
    factor = 0 if case.what == "rollout" else 1
    return Work(case.work().flops, factor * case.layers * case.dtype.itemsize * (17 * case.D * rows + keys))


def no_checkpointing(case: StepCase) -> str | None:
    return "it needs a cache of keys and values, which gradient checkpointing turns off" if case.checkpointing else None


def changed(change: Callable[[QuietStar], Any]) -> Callable[[StepCase], TrainingStep | Rollout]:
    """Ours, whose model is changed before its first call."""

    def prepared(case: StepCase) -> TrainingStep | Rollout:
        function = prepare(QuietStar)(case)
        change(function.qs)
        return function

    return prepared


def with_liger(qs: QuietStar) -> None:
    """With Liger's norms and feed-forward layers, which transformers' ``use_kernels`` takes from the hub."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, model=qs.model)
    vars(modeling_llama).update(before)  # which it changes for models to come


def with_their_layers(qs: QuietStar) -> None:
    """transformers' own layers instead of ours."""
    for layer in qs.modules():
        if isinstance(layer, FusedLayer):
            layer.__class__ = layer.unfused


def no_liger(case: StepCase) -> str | None:
    return not_installed("liger-kernel") or (None if case.device.type == "cuda" else "liger-kernel is for GPUs")


OURS = Candidate("QuietStar", prepare(QuietStar), package=PACKAGE)
LIGER = Candidate("QuietStar, Liger's layers", changed(with_liger), "liger-kernel", no_liger)
COMPILED = Candidate("QuietStar, compiled", changed(lambda qs: qs.compile()), PACKAGE, compiles=True)
UNFUSED = Candidate("QuietStar, transformers' layers", changed(with_their_layers), PACKAGE)
LAUNCHED = Candidate("QuietStar without a graph", changed(lambda qs: setattr(qs, "graphs", False)), PACKAGE)
FAST_LINEAR = Candidate("QuietStar, linear layers by oneDNN", changed(fast_linear), PACKAGE)
PUBLISHED = Candidate("published schedule", prepare(PublishedSchedule), "transformers", no_checkpointing, kept_by_passes)


def candidates(case: StepCase) -> list[Candidate]:
    """Steps of a real model's shape are compared with ours in other ways, others with the published schedule; the headline and
    rollouts on a GPU also with transformers' layers. On a GPU our rollouts replay CUDA graphs, so there they are also compared
    with ours without graphs; on a CPU whose MKL is slow, ours are compared with ``fast_linear``."""
    if case.grid in (SMALLEST, FOUR_LAYERS, LARGEST):
        return [UNFUSED, LIGER, COMPILED] if case.grid == FOUR_LAYERS else [UNFUSED, LIGER]
    if case.device.type == "cpu" and case.grid == "headline":
        return [PUBLISHED, UNFUSED] + [FAST_LINEAR] * (products.library() != "pytorch")
    return [UNFUSED, LAUNCHED, PUBLISHED] if case.what == "rollout" and case.device.type == "cuda" else [PUBLISHED]


def cases(device: torch.device, full: bool) -> Iterator[StepCase]:
    """The grid, the most important cases first. On a GPU, models of real shapes come first."""
    gpu = device.type == "cuda"
    if gpu:
        small = StepCase(L=256, layers=8, D=1024, I=3072, H=8, G=2, V=32000, dtype=torch.bfloat16, device=device)
        yield (smallest := replace(small, grid=SMALLEST, B=4, **QWEN3_600M))
        yield replace(smallest, grid=FOUR_LAYERS, layers=4)
        yield replace(small, grid=LARGEST, lora=True, checkpointing=True, B=8, **LLAMA_8B)
        yield replace(smallest, grid="rollout", what="rollout")
        yield replace(small, grid="rollout", what="rollout")
        yield replace(small, grid="small")
    else:
        small = StepCase(L=128, device=device)
        for what in ("training step", "rollout"):
            yield replace(small, what=what)
    for T in (1, 2, 4, 8, 16) if full else (1, 4, 12):
        yield replace(small, grid="passes", T=T, L=small.L if gpu else 64)
    for L in (64, 256, 512) if full else ():
        yield replace(small, grid="text", L=L)


def smoke(device: torch.device) -> list[StepCase]:
    """The smallest cases that run every candidate."""
    tiny = StepCase(L=6, N=1, T=2, J=2, layers=1, D=32, I=48, H=2, G=1, V=80, device=device)
    lora = replace(tiny, grid=LARGEST, lora=True, checkpointing=True)
    return [
        replace(tiny, grid=SMALLEST),
        replace(tiny, grid=FOUR_LAYERS),
        lora,
        replace(tiny, grid="rollout", what="rollout"),
        tiny,
    ]


BENCHMARK = Benchmark(StepCase.op, OURS, candidates, cases, smoke)
