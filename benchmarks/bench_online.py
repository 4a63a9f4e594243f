"""A step of RLP: long thoughts at a few anchors of a text, which end themselves, sampled and trained packed.

Against a loop over anchors, as the public re-implementation of RLP has it, and a sequence for each thought. A step samples,
computes the loss and its gradients; "rollout" is sampling alone. A random model's thoughts would all have T tokens, so its end
token has a bias that ends them after about 0.4 T. The note says what their mean is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.baselines.llama import LlamaCase, random_llama
from benchmarks.baselines.online import END, SEED, START, AnchorByAnchor, SequencePerThought, Way
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate
from benchmarks.harness.case import Inputs, Work, Wrong, judge
from benchmarks.harness.compare import Conditions, Row, as_note, blank, check_device, fill, run_once
from quietstar import QuietStar, ThoughtConfig
from quietstar.testing import byte_tokenizer

BOUND = 1e-4  # of rewards and gradients, as in bench_group_rl


@dataclass(frozen=True, kw_only=True)
class OnlineCase(LlamaCase):
    """N thoughts of at most T tokens at P anchors of B texts, with a random Llama."""

    op: ClassVar[str] = "online"
    size_names = ("B", "L", "P", "N", "T", "layers", "D", "H", "G", "V")
    what: str = "step"
    B: int = 4
    L: int = 512
    P: int = 8
    N: int = 16
    T: int = 256

    @property
    def anchors(self) -> list[int]:
        """The middles of P parts of a text."""
        return [(2 * p + 1) * self.L // (2 * self.P) for p in range(self.P)]

    @property
    def config(self) -> ThoughtConfig:
        start, end = byte_tokenizer().convert_ids_to_tokens([START, END])
        return ThoughtConfig(preset="rlp", thoughts=self.N, thought_tokens=self.T, thought_start=start, thought_end=end)

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B,P,N], sampled tokens of the thoughts."""
        return (Packed(self).rollout(self.inputs(1)["input_ids"]) >= 0).sum(-1).cpu()

    def work(self) -> Work:
        """Matmuls of sampling; in a step also of the packed forward, its backward, and the base model's forward of the text."""
        own, of_token = self.lengths, 2 * self.D * self.V
        head = of_token * int(own.sum())
        sampling = self._layers(own) + head
        if self.what == "rollout":
            return Work(sampling)
        packed = self._layers(own + 1)  # start, content and end
        return Work(sampling + 3 * (packed + head) + self._layers(own[..., :0]) + 2 * of_token * self.B * self.P)

    def _layers(self, own: Tensor) -> float:
        """FLOPs of the layers, for the text and thoughts of ``own`` [B,P,n] rows."""
        before = torch.tensor(self.anchors)[:, None] + 1
        pairs = self.B * self.L * (self.L + 1) / 2 + float((own * before + own * (own + 1) / 2).sum())
        return 2 * (self.B * self.L + int(own.sum())) * self.matrices + self.layers * 4 * self.K * self.H * pairs

    def inputs(self, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(2, self.V, (self.B, self.L), generator=generator).to(self.device)}

    def call(self, function: Way, inputs: Inputs) -> Tensor:
        ids = inputs["input_ids"]
        return function.rollout(ids) if self.what == "rollout" else function.step(ids)[0]

    def check(self, function: Way) -> None:
        """Compare thoughts, rewards and gradients of a smaller step with those of the loop over anchors.

        In fp32, since coarser rounding changes tokens. The loss itself is 0, since an anchor's advantages add up to 0.
        """
        sizes = {"B": min(self.B, 2), "L": min(self.L, 48), "P": min(self.P, 3), "N": min(self.N, 4), "T": min(self.T, 32)}
        small = replace(self, dtype=torch.float32, **sizes)
        ids, (mine, truth) = small.inputs(seed=0)["input_ids"], (way(small) for way in (type(function), AnchorByAnchor))
        (thoughts, rewards), (wanted, exact) = mine.step(ids), truth.step(ids)
        if not torch.equal(thoughts, wanted):
            raise Wrong(f"{int((thoughts != wanted).any(-1).sum())} of {rewards.numel()} thoughts differ")
        judge("rewards", rewards, exact, BOUND)
        pairs = zip(mine.model.parameters(), truth.model.parameters(), strict=True)
        judge("gradient", *(torch.cat([x.grad.flatten() for x in side]) for side in zip(*pairs, strict=True)), BOUND)

    def model(self) -> PreTrainedModel:
        model = random_llama(self, SEED, max_position_embeddings=self.L + self.T + 4)
        bias = torch.zeros_like(model.lm_head.weight[:, 0])
        bias[END] = self.config.temperature * math.log(7 / 3 * self.V / self.T)  # a probability of about 7 / (3 T)
        model.lm_head.bias = nn.Parameter(bias)
        return model


class Packed(Way):
    """Ours."""

    def __init__(self, case: OnlineCase):
        self.case, self.model = case, case.model()
        self.qs = QuietStar(self.model, case.config, byte_tokenizer(), verify=False).train()
        self.given = {"anchors": torch.tensor([case.anchors] * case.B, device=case.device), "seed": SEED}

    def rollout(self, ids: Tensor) -> Tensor:
        thoughts = self.qs.think(ids, **self.given)
        return self._marked(thoughts.thought_ids, thoughts.thought_lengths)

    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.model.zero_grad()
        out = self.qs(ids, **self.given)
        out.loss.backward()
        return self._marked(out.thought_ids, out.thought_lengths), out.reward

    def _marked(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return ids.masked_fill(torch.arange(self.case.T, device=ids.device) >= lengths[..., None], -1)


def compared(case: OnlineCase, ours: Candidate, baselines: Sequence[Candidate], conditions: Conditions) -> list[Row]:
    """Time and memory of one run of each, since a baseline takes minutes, with a run of ours after it.

    On a GPU a run that compiles comes first. Thoughts are compared once more: at this size rounding changes a few.
    """
    rows, inputs = [], case.inputs(seed=1)
    for candidate in (ours, *baselines):
        rows.append(row := blank(case, candidate, is_ours=candidate is ours))
        try:
            way = candidate.prepare(case)
            case.check(way)
            if case.device.type == "cuda":
                run_once(case, way, inputs)
            thoughts, seconds, row.peak_bytes = run_once(case, way, inputs)
            if row.is_ours:
                mine, wanted = way, thoughts
            differ = int((thoughts != wanted).any(-1).sum())
            if case.dtype == torch.float32 and differ > wanted[..., 0].numel() / 50:
                raise Wrong(f"{differ} of {wanted[..., 0].numel()} thoughts differ")
            row.times_ours = 1.0 if row.is_ours else seconds / run_once(case, mine, inputs)[1]
        except Exception as error:  # as in ``compare``
            row.note = as_note(error)
            check_device(case.device, error)
            continue
        fill(row, case, conditions.rates, seconds)
        row.rounds, row.note = 1, f"thoughts of {float(case.lengths.float().mean()):.0f} tokens"
        if differ:
            row.note += f", {differ} differ because of rounding"
        conditions.write(rows)
    return rows


OURS = Candidate("QuietStar", Packed, PACKAGE)
BASELINES = [
    Candidate("anchor by anchor, as in GRLP", AnchorByAnchor, "transformers"),
    Candidate("a sequence for each thought", SequencePerThought, "transformers"),
]


def cases(device: torch.device, full: bool) -> Iterator[OnlineCase]:
    """The headline only in a full run, since the baselines take minutes; else short thoughts, on a CPU of one text."""
    gpu = {"L": 1024, "layers": 8, "D": 1024, "I": 3072, "H": 8, "G": 2, "V": 32000, "dtype": torch.bfloat16}
    headline = OnlineCase(device=device, **(gpu if device.type == "cuda" else {}))
    if full:
        yield headline
        yield replace(headline, what="rollout")
    yield replace(headline, grid="short", **({"P": 2, "T": 32} if device.type == "cuda" else {"B": 1, "P": 4, "T": 64}))


def smoke(device: torch.device) -> list[OnlineCase]:
    """The smallest cases that run every candidate."""
    tiny = OnlineCase(B=1, L=12, P=2, N=2, T=6, layers=1, D=32, I=48, H=2, G=1, V=80, device=device)
    return [replace(tiny, grid="short"), replace(tiny, what="rollout")]


BENCHMARK = Benchmark(OnlineCase.op, OURS, lambda case: BASELINES, cases, smoke, compared)
