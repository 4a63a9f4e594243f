"""Every op once on a few small random inputs, forward and backward: something for a memory checker to watch.

compute-sanitizer --tool memcheck python benchmarks/small_cases.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402

from quietstar_kernels import linear_logprob, sample_token, thought_attention, thought_decode  # noqa: E402
from quietstar_kernels.testing import (  # noqa: E402
    attention_inputs,
    decode_inputs,
    forward_backward,
    logprob_inputs,
    random_layout,
    sample_inputs,
)

KINDS = ("every", "ragged", "documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for seed, kind in enumerate(KINDS):
        for dtype in (torch.float32, torch.float16):
            generator = torch.Generator().manual_seed(seed)
            layout = random_layout(generator, kind, max_text=40, device=device)
            inputs = attention_inputs(generator, layout, width=64, dtype=dtype)
            forward_backward(thought_attention, inputs, [torch.ones_like(inputs["q"])], layout=layout)
            inputs = decode_inputs(generator, layout, width=64, dtype=dtype)
            thought_decode(**inputs, layout=layout, step=0)
            sample_token(**sample_inputs(generator, 5, 32, dtype=dtype, device=device), seed=seed)
            inputs = logprob_inputs(generator, 5, 32, dtype=dtype, device=device)
            grads = [torch.ones(5, device=device)]
            forward_backward(linear_logprob, {"targets": inputs.pop("targets")} | inputs, grads)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(KINDS)} layouts, all ops, no error raised")


if __name__ == "__main__":
    main()
