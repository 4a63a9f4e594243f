"""Thoughts at every position of a text: all at once (``QuietStar.think``) against one position after another.

naive          reads the prefix, then generates N thoughts of T tokens, anew at every position
careful naive  reads the text once a round; every position goes on from a copy of the cache up to itself
batched        ``QuietStar.think``

    python benchmarks/bench_naive.py
    python benchmarks/bench_naive.py --positions 16    # a quick look

All three run the same random Llama with the same seed and counters, draw with the same sampler and must give the same
thoughts. The naive ones are the plain transformers model with sdpa attention and a DynamicCache. "memory" is what thinking
adds to the process; for the naive methods at the last position, where it is highest.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from harness import add_flags, peak_memory, print_table, versions, write_json
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar_kernels import sample_token

NAIVE, CAREFUL, BATCHED = "naive", "careful naive", "batched"
Methods = dict[str, Callable[[Tensor], Tensor]]  # anchors [P] to thoughts [P,N,T]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    anchors = evenly_spaced(args.positions or args.length, args.length)
    print(f"{versions()}, transformers {transformers.__version__}")
    print(f"L={args.length} N={args.thoughts} T={args.thought_tokens} D={args.width} V={args.vocabulary}, {args.layers} layers")
    if len(anchors) < args.length:
        print(f"QUICK LOOK: {len(anchors)} of {args.length} positions think; ratios are lower than with all of them")

    methods = make_methods(args)
    few = evenly_spaced(min(4, len(anchors)), args.length)
    check(args, few, {name: run(few) for name, run in methods.items()})
    seconds, thoughts = take_turns(methods, anchors, args.repeats)
    by_rounding = check(args, anchors, thoughts)
    last = {NAIVE: anchors[-1:], CAREFUL: anchors[-1:], BATCHED: anchors}
    rows = [
        {
            "method": name,
            "seconds": seconds[name],
            "thoughts/s": thoughts[name][..., 0].numel() / seconds[name],
            "batched is faster by": seconds[name] / seconds[BATCHED],
            "memory, MB": peak_memory(lambda run=run, name=name: run(last[name])),
            "thoughts that differ (rounding)": by_rounding[name],
        }
        for name, run in methods.items()
    ]
    print_table(rows)
    write_json(args.json, rows=rows, **{name: value for name, value in vars(args).items() if name != "json"})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="L, text tokens")
    parser.add_argument("--positions", type=int, help="how many of them think, evenly spaced; default all")
    parser.add_argument("--thoughts", type=int, default=2, help="N, thoughts at every position")
    parser.add_argument("--thought-tokens", type=int, default=9, help="T, tokens in a thought")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="D")
    parser.add_argument("--vocabulary", type=int, default=2048, help="V")
    add_flags(parser)
    return parser.parse_args(argv)


def evenly_spaced(count: int, length: int) -> Tensor:
    return torch.linspace(0, length - 1, count).round().long()


def make_methods(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Methods:
    """The three methods over the same model and text, at each call the same."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        initializer_range=args.width**-0.5,
    )
    text = torch.randint(args.vocabulary, (1, args.length))
    plain = LlamaForCausalLM(config).to(dtype).eval()
    thought_config = ThoughtConfig(thoughts=args.thoughts, thought_tokens=args.thought_tokens, embedding_scale=1)
    qs = QuietStar(copy.deepcopy(plain), thought_config)
    start = qs.start_embedding.to(dtype).expand(args.thoughts, 1, -1)

    def go_on(cache: DynamicCache, position: int) -> Tensor:
        """N thoughts [N,T] after the text in ``cache``."""
        embeds, tokens = start, []
        for s in range(args.thought_tokens):
            hidden = plain.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state[:, 0]
            counters = torch.tensor([[0, position, n, s] for n in range(args.thoughts)], dtype=torch.int32)
            tokens.append(sample_token(hidden, plain.lm_head.weight, counters, args.seed)[0])
            embeds = plain.model.embed_tokens(tokens[-1])[:, None]
        return torch.stack(tokens, -1)

    def naive(anchors: Tensor) -> Tensor:
        thoughts = []
        for t in anchors.tolist():
            cache = DynamicCache()
            plain.model(text[:, : t + 1], past_key_values=cache)
            cache.batch_repeat_interleave(args.thoughts)
            thoughts.append(go_on(cache, t))
        return torch.stack(thoughts)

    def careful_naive(anchors: Tensor) -> Tensor:
        whole, thoughts = DynamicCache(), []
        plain.model(text, past_key_values=whole)
        for t in anchors.tolist():
            cache = DynamicCache()
            for i, layer in enumerate(whole.layers):
                prefix = (x[:, :, : t + 1].expand(args.thoughts, -1, -1, -1) for x in (layer.keys, layer.values))
                cache.update(*prefix, i)
            thoughts.append(go_on(cache, t))
        return torch.stack(thoughts)

    def batched(anchors: Tensor) -> Tensor:
        places = None if len(anchors) == args.length else anchors[None]
        return qs.think(text, anchors=places, seed=args.seed, greedy=False).thought_ids[0]

    return {NAIVE: naive, CAREFUL: careful_naive, BATCHED: batched}


def take_turns(methods: Methods, anchors: Tensor, rounds: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Seconds and thoughts of all anchors.

    A naive method takes a share of the anchors in each round and is done once after the last; the batched one takes all of
    them in each, and its seconds are the mean. So a busy machine slows all of them alike.
    """
    seconds, shares = dict.fromkeys(methods, 0.0), {name: [] for name in methods}
    rounds = min(rounds, len(anchors))
    for i in range(rounds):
        for name, run in methods.items():
            mine = anchors if name == BATCHED else anchors[i::rounds]
            began = time.perf_counter()
            shares[name].append(run(mine))
            seconds[name] += time.perf_counter() - began
    seconds[BATCHED] /= rounds
    order = torch.cat([torch.arange(len(anchors))[i::rounds] for i in range(rounds)]).argsort()
    return seconds, {name: done[0] if name == BATCHED else torch.cat(done)[order] for name, done in shares.items()}


def check(args: argparse.Namespace, anchors: Tensor, thoughts: dict[str, Tensor]) -> dict[str, int]:
    """How many thoughts of each method differ from the batched ones; more than rounding explains raises RuntimeError."""
    differ = {name: (mine != thoughts[BATCHED]).any(-1) for name, mine in thoughts.items()}
    for name, wrong in differ.items():
        # What rounding changed in fp32, where a draw fell next to the edge between two tokens, is the same in fp64.
        exact = make_methods(args, torch.float64) if wrong.any() else {}
        places = anchors[wrong.any(-1)]
        if exact and not torch.equal(exact[name](places), exact[BATCHED](places)):
            raise RuntimeError(f"{name}: {int(wrong.sum())} of {wrong.numel()} thoughts differ from the batched ones")
    return {name: int(wrong.sum()) for name, wrong in differ.items()}


if __name__ == "__main__":
    main()
