"""Thoughts at every position of a text: all at once (``QuietStar.think``) against one position after another.

naive          read the prefix, then generate T tokens for N thoughts, anew at every position
careful naive  read the text once; every position starts from a copy of the cache up to itself
batched        ``QuietStar.think``

All three run the same model with the same seed and counters and must give the same thoughts. The naive ones are a plain
transformers model with sdpa attention and a DynamicCache, and draw by the same sampler.

    python benchmarks/bench_naive.py
    python benchmarks/bench_naive.py --positions 16
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import quietstar_kernels
from quietstar import QuietStar, ThoughtConfig
from quietstar_kernels import sample_token

SEED = 0


@dataclass(frozen=True)
class Sizes:
    """L, N, T, V, D and the number of layers; ``positions`` of the L think, evenly spaced, or all (0)."""

    length: int = 256
    thoughts: int = 2
    thought_tokens: int = 9
    vocabulary: int = 2048
    width: int = 256
    layers: int = 4
    positions: int = 0

    def anchors(self) -> Tensor:
        count = min(self.positions, self.length) or self.length
        return torch.linspace(0, self.length - 1, count).round().long()


def make(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[QuietStar, Tensor]:
    """The same random model and text [1,L] at each call."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        initializer_range=sizes.width**-0.5,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    thought_config = ThoughtConfig(thoughts=sizes.thoughts, thought_tokens=sizes.thought_tokens, embedding_scale=1)
    return QuietStar(model, thought_config), torch.randint(sizes.vocabulary, (1, sizes.length))


def batched(qs: QuietStar, ids: Tensor, anchors: Tensor) -> Tensor:
    """Thoughts [P,N,T]; so do the other two."""
    chosen = None if len(anchors) == ids.shape[1] else anchors[None]
    return qs.think(ids, anchors=chosen, seed=SEED, greedy=False).thought_ids[0]


def naive(qs: QuietStar, ids: Tensor, anchors: Tensor) -> Tensor:
    thoughts = []
    for t in anchors.tolist():
        cache = DynamicCache()
        qs.model.model(ids[:, : t + 1], past_key_values=cache)
        cache.batch_repeat_interleave(qs.thought_config.thoughts)
        thoughts.append(generate(qs, cache, t))
    return torch.stack(thoughts)


def careful_naive(qs: QuietStar, ids: Tensor, anchors: Tensor) -> Tensor:
    text = DynamicCache()
    qs.model.model(ids, past_key_values=text)
    N, thoughts = qs.thought_config.thoughts, []
    for t in anchors.tolist():
        cache = DynamicCache()
        for i, layer in enumerate(text.layers):
            keys, values = (x[:, :, : t + 1].expand(N, -1, -1, -1) for x in (layer.keys, layer.values))
            cache.update(keys, values, i)  # copies
        thoughts.append(generate(qs, cache, t))
    return torch.stack(thoughts)


def generate(qs: QuietStar, cache: DynamicCache, position: int) -> Tensor:
    """N thoughts of T tokens, [N,T], that go on from the text in ``cache``."""
    config, model = qs.thought_config, qs.model.model
    counters = torch.tensor([[0, position, n, 0] for n in range(config.thoughts)], dtype=torch.int32)
    embeds, tokens = qs.start_embedding.to(qs.model.dtype).expand(config.thoughts, 1, -1), []
    for s in range(config.thought_tokens):
        hidden = model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state[:, 0]
        counters[:, 3] = s
        tokens.append(sample_token(hidden, qs.model.lm_head.weight, counters, SEED)[0])
        embeds = model.embed_tokens(tokens[-1])[:, None]
    return torch.stack(tokens, -1)


METHODS: dict[str, Callable[[QuietStar, Tensor, Tensor], Tensor]] = {
    "naive": naive,
    "careful naive": careful_naive,
    "batched": batched,
}


def prepare(method: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """The method on a fresh model: anchors to thoughts."""
    qs, ids = make(sizes, dtype)
    if method != "batched":
        qs.model.set_attn_implementation("sdpa")
    return torch.no_grad()(functools.partial(METHODS[method], qs, ids))


def measure(method: str, sizes: Sizes, repeats: int, threads: int) -> tuple[float, float | None, Tensor]:
    """Median seconds of one method, the MiB by which it raised this process's peak memory, and its thoughts."""
    torch.set_num_threads(threads)
    run, anchors = prepare(method, sizes), sizes.anchors()
    run(anchors[:1])
    reset_peak()
    before = memory("VmRSS")
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        thoughts = run(anchors)
        seconds.append(time.perf_counter() - began)
    peak = None if before is None else memory("VmHWM") - before
    return statistics.median(seconds), peak, thoughts


def memory(name: str) -> float | None:
    """MiB of this process: VmRSS now, VmHWM at most so far. None where the system does not tell.

    Not getrusage, whose peak a new process inherits from its parent on Linux.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def reset_peak() -> None:
    """Otherwise the peak may be that of importing torch."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def in_own_process(*arguments) -> tuple[float, float | None, Tensor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def explained_by_rounding(sizes: Sizes, method: str, places: Tensor) -> bool:
    """Whether both methods give the same thoughts at these anchors in fp64."""
    anchors = sizes.anchors()[places]
    return torch.equal(*(prepare(name, sizes, torch.float64)(anchors) for name in (method, "batched")))


def compare(sizes: Sizes, repeats: int, threads: int) -> list[dict]:
    """One row per method. Raises RuntimeError where thoughts differ by more than rounding."""
    results = {}
    for method in METHODS:
        print(f"{method} ...", file=sys.stderr)
        results[method] = in_own_process(method, sizes, repeats if method == "batched" else 1, threads)
    fastest, _, truth = results["batched"]
    rows = []
    for method, (seconds, peak, thoughts) in results.items():
        differs = (thoughts != truth).any(-1)
        if differs.any() and not explained_by_rounding(sizes, method, differs.any(-1).nonzero()[:, 0]):
            raise RuntimeError(f"{method}: {int(differs.sum())} of {differs.numel()} thoughts differ from the batched ones")
        rows.append(
            {
                "method": method,
                "seconds": seconds,
                "thoughts_per_second": differs.numel() / seconds,
                "batched_is_faster_by": seconds / fastest,
                "peak_mib": peak,
                "differ_by_rounding": int(differs.sum()),
            }
        )
    return rows


def environment(threads: int) -> dict:
    return {
        "quietstar_kernels": quietstar_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": threads,
        "backend": os.environ.get("QUIETSTAR_BACKEND", "auto"),
    }


def show(sizes: Sizes, rows: list[dict], env: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in env.items()))
    print(", ".join(f"{name} {value}" for name, value in asdict(sizes).items() if name != "positions"))
    thinking = len(sizes.anchors())
    note = "" if thinking == sizes.length else f": a quick look, only {thinking} of {sizes.length} positions think"
    print(f"Same thoughts from all methods{note}\n")
    print(f"{'':<14}{'seconds':>9}{'thoughts/s':>12}{'ratio':>8}{'peak, MiB':>11}{'differ by rounding':>20}")
    for row in rows:
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(
            f"{row['method']:<14}{row['seconds']:>9.2f}{row['thoughts_per_second']:>12,.0f}"
            f"{row['batched_is_faster_by']:>7.1f}x{peak:>11}{row['differ_by_rounding']:>20}"
        )
    print("\nratio: seconds over the batched ones. peak: memory above that before the call, each method in its own process.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default or 'all'}")
    parser.add_argument("--repeats", type=int, default=5, help="of the batched method; the others run once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = vars(parser.parse_args())
    repeats, threads, as_json = (arguments.pop(name) for name in ("repeats", "threads", "json"))
    sizes, env = Sizes(**arguments), environment(threads)
    rows = compare(sizes, repeats, threads)
    if as_json:
        print(json.dumps({"environment": env, "sizes": asdict(sizes), "seed": SEED, "methods": rows}, indent=2))
    else:
        show(sizes, rows, env)


if __name__ == "__main__":
    main()
