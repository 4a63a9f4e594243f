"""Call every op on a few small random inputs with each fast back end, forward and backward, for a memory checker to watch.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.small_cases --few

With ``--gluon`` only attention's kernels in Gluon run, and their results are checked for where a NaN goes.
"""

from __future__ import annotations

import argparse
import os

import torch

from benchmarks.harness.candidate import gluon
from benchmarks.report import units
from quietstar_kernels import ThoughtLayout, backends, linear_logprob, sample_token, thought_attention, thought_decode
from quietstar_kernels.testing import (
    attention_inputs,
    decode_inputs,
    forward_backward,
    logprob_inputs,
    random_layout,
    sample_inputs,
)
from quietstar_kernels.triton import gluon_why_not_on

KINDS = ("every", "ragged", "documents")
WIDTHS = (64, 128, 256)  # each has a kernel of its own in the CUDA back end
SHORT = {"cuda": torch.bfloat16, "cpu": torch.float16}  # Triton's interpreter is wrong in bf16
LONG = 600  # text positions; with few rows they are split among several thread blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="one layout and one width, for a slow checker or interpreter")
    parser.add_argument("--gluon", action="store_true", help="one case of attention in Gluon, and the same with a NaN")
    args = parser.parse_args()
    if args.gluon:
        return attention_in_gluon(args.device)
    device, kinds, widths = args.device, KINDS[: 1 if args.few else None], WIDTHS[: 1 if args.few else None]
    for seed, kind in enumerate(kinds):
        for dtype in (torch.float32, torch.float16):
            generator = torch.Generator().manual_seed(seed)
            layout = random_layout(generator, kind, max_text=10 if args.few else 40, device=device)
            inputs = attention_inputs(generator, layout, width=64, dtype=dtype)
            forward_backward(thought_attention, inputs, [torch.ones_like(inputs["q"])], layout=layout)
            inputs = sample_inputs(generator, 5, 32, dtype=dtype, device=device)
            for backend in fast("sample_token", device):
                sample_token(**inputs, seed=seed, backend=backend)
            decode(generator, layout, 64, dtype)
            inputs = logprob_inputs(generator, 5, 32, dtype=dtype, device=device)
            grads = [torch.ones(5, device=device)]
            forward_backward(linear_logprob, {"targets": inputs.pop("targets")} | inputs, grads)
    for width in widths:
        generator = torch.Generator().manual_seed(width)
        decode(generator, random_layout(generator, "ragged", max_text=40, device=device), width, SHORT[device])
        anchors = torch.tensor([[LONG // 2, LONG - 1]], dtype=torch.int32, device=device)
        decode(generator, ThoughtLayout.at(anchors, thoughts=1, rows=4, text_length=LONG), width, SHORT[device])
    if device == "cuda":
        torch.cuda.synchronize()
    served = ", ".join(f"{op} by {' and '.join(fast(op, device))}" for op in ("thought_decode", "sample_token"))
    print(f"All ops ran on {units.count(len(kinds), 'layout')}; {served}")


def attention_in_gluon(device: str) -> None:
    """More tiles than a GPU has multiprocessors, and more blocks of text than a ring of copies has slots."""
    if reason := gluon_why_not_on(torch.device(device), SHORT[device]):
        return print(f"Gluon's do not run here: {reason}")
    generator = torch.Generator().manual_seed(0)
    layout = ThoughtLayout.every_position(1, LONG, 1, 4, device)
    inputs = attention_inputs(generator, layout, heads=8, groups=2, width=128, dtype=SHORT[device])
    poisoned = inputs | {"v": inputs["v"].clone()}
    poisoned["v"][:, :, LONG // 2] = torch.nan
    grads = [torch.ones_like(inputs["q"])]
    with gluon():
        (out, *_), (bad, *_) = (forward_backward(thought_attention, x, grads, layout=layout)[0] for x in (inputs, poisoned))
    sees = layout.dense_mask()[0, :, LONG // 2]
    if not (torch.equal(bad[:, :, ~sees], out[:, :, ~sees]) and bad[:, :, sees].isnan().all() and out.isfinite().all()):
        raise AssertionError("a NaN reaches rows that don't see it, or not those that do")
    print("attention in Gluon: a NaN reaches the rows that see it and no other")


def fast(op: str, device: str) -> list[str]:
    """The available fast back ends of an op on a device, or the one that QUIETSTAR_BACKEND names if it is available."""
    made = ("triton", "cuda") if device == "cuda" else ("cpu",)
    made = (os.environ["QUIETSTAR_BACKEND"],) if "QUIETSTAR_BACKEND" in os.environ else made
    status = {row["backend"]: row["status"] for row in backends(device) if row["op"] == op}
    return [backend for backend in made if status[backend] == "available"]


def decode(generator: torch.Generator, layout: ThoughtLayout, width: int, dtype: torch.dtype) -> None:
    inputs = decode_inputs(generator, layout, width=width, dtype=dtype)
    for backend in fast("thought_decode", layout.device.type):
        if backend != "cuda" or dtype != torch.float32:  # it supports only 16-bit types
            thought_decode(**inputs, layout=layout, step=0, backend=backend)


if __name__ == "__main__":
    main()
