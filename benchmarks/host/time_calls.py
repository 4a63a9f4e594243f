"""Print, as JSON, the seconds that the host spends on a call of each op.

    python -m benchmarks.host.time_calls --device cpu

Without a GPU the kernels are empty (``empty_kernels``). With one they are launched, with sizes so small that the device waits
for the host. Each number is the minimum of many rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402

from quietstar_kernels import ThoughtLayout, sample_token, thought_attention, thought_decode  # noqa: E402

CALLS = 8  # per reading of the clock; as in a model, attention has one backward through all of its calls
B, L, N, S, H, G, K, R, D, V = 1, 4, 2, 4, 2, 1, 128, 8, 64, 512
Calls = Callable[[], Any]


def calls(device: torch.device) -> dict[str, Calls]:
    """Functions, by name, that each call an op CALLS times."""
    layout = ThoughtLayout.every_position(B, L, N, S, device)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    leaves = [[rows(B, layout.M, heads, K).transpose(1, 2).requires_grad_() for heads in (H, G, G)] for _ in range(CALLS)]
    grads = [rows(B, H, layout.M, K) for _ in range(CALLS)]
    caches = [rows(B, G, L, K) for _ in "kv"] + [rows(B, G, L * N, S, K) for _ in "kv"]
    step, seed = (torch.ones((), dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))
    q, hidden, weight = rows(B, H, L * N, K), rows(R, D), rows(V, D)
    counters = torch.zeros(R, 4, dtype=torch.int32, device=device)
    options = {"backend": "triton"}

    def forward() -> list[torch.Tensor]:
        return [thought_attention(*qkv, layout, **options) for qkv in leaves]

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), [x for qkv in leaves for x in qkv], grads)

    def decode() -> list[torch.Tensor]:
        return [thought_decode(q, *caches, layout, step, **options) for _ in range(CALLS)]

    def sample() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [sample_token(hidden, weight, counters, seed, **options) for _ in range(CALLS)]

    no_grad = torch.no_grad()
    return {
        "attention forward": no_grad(forward),
        "attention forward+backward": both,
        "decode": no_grad(decode),
        "sample_token": no_grad(sample),
    }


def fastest(run: Calls, device: torch.device, rounds: int) -> float:
    """Seconds of a call."""
    run()
    shortest = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - began)
        if device.type == "cuda":
            torch.cuda.synchronize()  # so that the queue of launches never fills up
    return shortest / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.device.type == "cpu":
        from benchmarks.host import empty_kernels

        empty_kernels.install()
    print(json.dumps({name: fastest(run, args.device, args.rounds) for name, run in calls(args.device).items()}))


if __name__ == "__main__":
    main()
