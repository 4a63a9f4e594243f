"""Print, as JSON, the seconds of the first call of thought_attention in a new process with empty caches.

    python -m benchmarks.gpu.first_call forward
    python -m benchmarks.gpu.first_call forward+backward

"another length" is the first call with other sizes of text and thoughts, which must not compile anything again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["forward", "forward+backward"])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        print(json.dumps(measure(args.what, args.device)))


def measure(what: str, device: str) -> dict[str, float]:
    import torch

    from quietstar_kernels import ThoughtLayout, thought_attention

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.ones(64, 64, device=device, dtype=dtype) @ torch.ones(64, 64, device=device, dtype=dtype)  # initializes the device

    def seconds(L: int, N: int, S: int) -> float:
        layout = ThoughtLayout.every_position(1, L, N, S, device)
        q, k, v = (
            torch.randn(1, heads, layout.M, 128, device=device, dtype=dtype, requires_grad=what != "forward")
            for heads in (8, 2, 2)
        )
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = thought_attention(q, k, v, layout)
        if what != "forward":
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return {"first call": seconds(64, 2, 14), "another length": seconds(81, 3, 9)}


if __name__ == "__main__":
    main()
