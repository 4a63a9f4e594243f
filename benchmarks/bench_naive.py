"""Thoughts at every position of a text: all at once (``QuietStar.think``) against one position after another.

naive          at every position, reads the prefix again and then generates N thoughts of T tokens
careful naive  reads the text once; every position continues from a copy of the cache up to that position
batched        ``QuietStar.think``

All three run the same random Llama with the same sampler, seed and counters, and must give the same thoughts. The naive methods
use the plain transformers model with sdpa attention and a DynamicCache. All are timed after a warm-up: the naive methods have
thought at some positions, the batched one twice at all, after which a GPU replays its graphs. A note has the seconds of its
first call. Memory is what thinking adds. For the naive methods it is measured at the last position, where it is highest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.baselines.llama import LlamaCase, random_llama
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate
from benchmarks.harness.case import Inputs, Work, Wrong
from benchmarks.harness.compare import Conditions, Row, blank, fill
from benchmarks.harness.memory import peak_memory
from benchmarks.report import units
from quietstar import QuietStar, ThoughtConfig
from quietstar_kernels import sample_token

NAIVE, CAREFUL, BATCHED = "naive", "careful naive", "batched"
SEED = 0
WARM_UP = 2  # calls of the batched method: the first is eager, the second captures what the others replay
Method = Callable[[Tensor], Tensor]  # maps anchors [P] to thoughts [P,N,T]


@dataclass(frozen=True, kw_only=True)
class NaiveCase(LlamaCase):
    """N thoughts of T tokens at P evenly spaced positions of a text."""

    op: ClassVar[str] = "naive"
    size_names = ("L", "P", "N", "T", "layers", "D", "V")
    what: str = "thoughts"
    L: int
    P: int
    N: int = 2
    T: int = 9
    G: int = 4

    @property
    def anchors(self) -> Tensor:
        return torch.linspace(0, self.L - 1, self.P).round().long()

    def work(self) -> Work:
        """Matmuls of the text's rows and of T rows per thought."""
        thoughts = self.P * self.N * self.T
        attention = self.layers * 4 * self.D * (self.L**2 / 2 + thoughts * (self.L + self.T) / 2)
        return Work(2 * (self.L + thoughts) * self.matrices + attention + 2 * thoughts * self.D * self.V)

    def inputs(self, seed: int) -> Inputs:
        return {"anchors": self.anchors}

    def call(self, function: Method, inputs: Inputs) -> Tensor:
        return function(inputs["anchors"])


@torch.no_grad()
def compare(case: NaiveCase, ours: Candidate, baselines: Sequence[Candidate], conditions: Conditions) -> list[Row]:
    """A row for each method. They are checked at a few positions before they are timed, and at all positions afterwards.

    Raises:
        Wrong: thoughts differ by more than rounding explains.
    """
    methods = {candidate.name: candidate.prepare(case) for candidate in (ours, *baselines)}
    few = case.anchors[:: max(1, case.P // 3)]
    check(case, few, {name: run(few) for name, run in methods.items()})
    first, _ = (seconds_of(methods[BATCHED], case.anchors) for _ in range(WARM_UP))
    seconds, thoughts = take_turns(methods, case.anchors, conditions.effort.rounds)
    by_rounding = check(case, case.anchors, thoughts)
    rows = []
    for candidate in (ours, *baselines):
        rows.append(row := blank(case, candidate, is_ours=candidate is ours))
        fill(row, case, conditions.rates, seconds[candidate.name])
        row.rounds = 1
        row.times_ours = seconds[candidate.name] / seconds[ours.name]
        last = case.anchors if candidate is ours else case.anchors[-1:]
        row.peak_bytes = peak_memory(lambda run=methods[candidate.name], last=last: run(last), case.device)
        notes = [f"the first call {units.seconds(first)}"] if candidate is ours else []
        if differ := by_rounding[candidate.name]:
            notes.append(f"{differ} thoughts differ because of rounding")
        row.note = ", ".join(notes)
    return rows


def make_method(case: NaiveCase, name: str, dtype: torch.dtype = torch.float32) -> Method:
    """A method with the case's model and text, which are the same at each call."""
    text = torch.randint(case.V, (1, case.L), generator=torch.Generator().manual_seed(SEED)).to(case.device)
    plain = random_llama(replace(case, dtype=dtype), SEED).eval()
    thought_config = ThoughtConfig(thoughts=case.N, thought_tokens=case.T, embedding_scale=1)
    qs = QuietStar(copy.deepcopy(plain), thought_config)
    start = qs.start_embedding.to(dtype).expand(case.N, 1, -1)

    def continue_from(cache: DynamicCache, position: int) -> Tensor:
        """N thoughts [N,T] after the text in ``cache``."""
        embeds, tokens = start, []
        for s in range(case.T):
            hidden = plain.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state[:, 0]
            counters = torch.tensor([[0, position, n, s] for n in range(case.N)], dtype=torch.int32, device=case.device)
            tokens.append(sample_token(hidden, plain.lm_head.weight, counters, SEED)[0])
            embeds = plain.model.embed_tokens(tokens[-1])[:, None]
        return torch.stack(tokens, -1)

    def naive(anchors: Tensor) -> Tensor:
        thoughts = []
        for t in anchors.tolist():
            cache = DynamicCache()
            plain.model(text[:, : t + 1], past_key_values=cache)
            cache.batch_repeat_interleave(case.N)
            thoughts.append(continue_from(cache, t))
        return torch.stack(thoughts).cpu()

    def careful_naive(anchors: Tensor) -> Tensor:
        whole, thoughts = DynamicCache(), []
        plain.model(text, past_key_values=whole)
        for t in anchors.tolist():
            cache = DynamicCache()
            for i, layer in enumerate(whole.layers):
                prefix = (x[:, :, : t + 1].expand(case.N, -1, -1, -1) for x in (layer.keys, layer.values))
                cache.update(*prefix, i)
            thoughts.append(continue_from(cache, t))
        return torch.stack(thoughts).cpu()

    def batched(anchors: Tensor) -> Tensor:
        places = None if len(anchors) == case.L else anchors[None].to(case.device)
        return qs.think(text, anchors=places, seed=SEED, greedy=False).thought_ids[0].cpu()

    return {NAIVE: naive, CAREFUL: careful_naive, BATCHED: batched}[name]


def seconds_of(run: Method, anchors: Tensor) -> float:
    began = time.perf_counter()
    run(anchors)
    return time.perf_counter() - began


def take_turns(methods: dict[str, Method], anchors: Tensor, rounds: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Seconds and thoughts of each method for all anchors.

    A naive method takes a share of the anchors in each round, so that it has taken all of them once after the last round. The
    batched method takes all anchors in each round, and its time is the mean. So a busy machine slows all methods alike.
    """
    seconds, shares = dict.fromkeys(methods, 0.0), {name: [] for name in methods}
    rounds = min(rounds, len(anchors))
    for i in range(rounds):
        for name, run in methods.items():
            mine = anchors if name == BATCHED else anchors[i::rounds]
            began = time.perf_counter()
            shares[name].append(run(mine))  # copies the ids to the CPU, which waits for a GPU
            seconds[name] += time.perf_counter() - began
    seconds[BATCHED] /= rounds
    order = torch.cat([torch.arange(len(anchors))[i::rounds] for i in range(rounds)]).argsort()
    return seconds, {name: done[0] if name == BATCHED else torch.cat(done)[order] for name, done in shares.items()}


def check(case: NaiveCase, anchors: Tensor, thoughts: dict[str, Tensor]) -> dict[str, int]:
    """How many thoughts of each method differ from the batched ones. Raises Wrong if rounding does not explain it."""
    differ = {name: (mine != thoughts[BATCHED]).any(-1) for name, mine in thoughts.items()}
    for name, wrong in differ.items():
        if not wrong.any():
            continue
        # In fp32 rounding can change a token whose draw is close to the boundary between two tokens. In fp64 they agree.
        places = anchors[wrong.any(-1)]
        exact, batched = (make_method(case, method, torch.float64)(places) for method in (name, BATCHED))
        if not torch.equal(exact, batched):
            raise Wrong(f"{name}: {int(wrong.sum())} of {wrong.numel()} thoughts differ from the batched ones")
    return {name: int(wrong.sum()) for name, wrong in differ.items()}


OURS = Candidate(BATCHED, partial(make_method, name=BATCHED), PACKAGE)
BASELINES = [Candidate(name, partial(make_method, name=name), "transformers") for name in (NAIVE, CAREFUL)]


def cases(device: torch.device, full: bool) -> Iterator[NaiveCase]:
    """All positions of a text. The full grid varies its length and the number of thoughts."""
    yield NaiveCase(L=256, P=256, device=device)
    if full:
        yield NaiveCase(grid="text", L=64, P=64, device=device)
        yield NaiveCase(grid="thoughts", L=256, P=256, N=8, device=device)


def smoke(device: torch.device) -> list[NaiveCase]:
    """The smallest case that runs every method."""
    return [NaiveCase(L=8, P=8, T=2, layers=1, D=64, I=192, H=1, G=1, V=80, device=device)]


BENCHMARK = Benchmark(NaiveCase.op, OURS, lambda case: BASELINES, cases, smoke, compare)
