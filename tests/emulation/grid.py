"""``python tests/emulation/grid.py LIBRARY [PART]``: runs a build of the CUDA kernels on a grid of small cases.

Each case is compared with plain PyTorch by the error rule, and with itself when blocks and threads run in the opposite order.
It runs in a separate process, since a sanitizer must be the first library to load, and ends the process if it finds a bug.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import emulated
import torch

from quietstar_kernels import ThoughtLayout, sample_token, thought_decode
from quietstar_kernels.cuda import sample_token as cuda_sample_token
from quietstar_kernels.cuda import thought_decode as cuda_thought_decode
from quietstar_kernels.testing import (
    LAYOUT_KINDS,
    assert_close_as_plain,
    decode_inputs,
    plain_decode,
    plain_log_softmax,
    random_layout,
    sample_inputs,
)

HEADS = [(1, 1), (4, 1), (6, 2), (7, 1), (8, 8), (32, 1)]
DECODE_OPTIONS = [{}, {"window": 3}, {"softcap": 5.0}, {"scale": 0.3}]
SAMPLE_OPTIONS = [{}, {"temperature": 0.0}, {"softcap": 3.0, "banned": (0, 7, 299)}, {"scale": -0.5, "temperature": 0.7}]
BLOCK_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_120": 99 * 1024}


def in_both_orders(op: Callable[[], Any]) -> Any:
    """The result of ``op``, which must not depend on the order in which blocks and threads run."""
    forward = op()
    with mock.patch.dict(os.environ, QUIETSTAR_SCAN="backward"):
        torch.testing.assert_close(op(), forward, rtol=0, atol=0, equal_nan=True)
    return forward


def decode(kernels) -> None:
    """All kinds of layouts, group sizes, options and widths, but not all combinations; then a text that is split."""
    generator = torch.Generator().manual_seed(0)
    heads, options = itertools.cycle(HEADS), itertools.cycle(DECODE_OPTIONS)
    dtypes, widths = itertools.cycle([torch.bfloat16, torch.float16]), itertools.cycle([64, 64, 128, 64, 256])
    for kind, memory in itertools.product(LAYOUT_KINDS, BLOCK_MEMORY):
        layout = random_layout(generator, kind, max_batch=2, max_text=40, max_thoughts=3, max_rows=6)
        shape = (*next(heads), next(widths))
        with emulated.serving(kernels, BLOCK_MEMORY[memory]):
            check_decode(generator, layout, shape, next(dtypes), f"{kind} {memory}", **next(options))
    everywhere = ThoughtLayout.every_position(1, 40, 2, 3)
    anchors = ThoughtLayout.at(torch.tensor([[5, 300, 699]]), 1, 4, text_length=700)
    with emulated.serving(kernels):
        check_decode(generator, anchors, (2, 1, 64), torch.bfloat16, "split")
        check_decode(generator, anchors, (2, 1, 64), torch.float16, "split, window", window=400)
        with mock.patch.object(cuda_thought_decode, "PROCESSORS", 0):  # so that no grid is too small for the largest tile
            check_decode(generator, everywhere, (4, 1, 64), torch.bfloat16, "128 rows a tile")


def check_decode(
    generator, layout: ThoughtLayout, shape: tuple[int, int, int], dtype: torch.dtype, what: str, **options
) -> None:
    """With NaN wherever no row may read."""
    H, G, K = shape
    inputs = decode_inputs(generator, layout, H, G, K, sinks=bool(H % 2), dtype=dtype)
    options |= {"layout": layout, "step": int(torch.randint(layout.S, (), generator=generator))}
    plain = plain_decode(**inputs, **options)
    truth = plain_decode(**{name: x if x is None else x.double() for name, x in inputs.items()}, **options)
    live = layout.live().flatten(1, 2)  # [B,P*N,S]
    unread = (~live | (torch.arange(layout.S) > options["step"]))[:, None, :, :, None]
    unseen = ~layout.dense_mask()[:, layout.L :, : layout.L].any(1)[:, None, :, None]
    off = ~live[:, None, :, options["step"], None]
    poisoned = {"q": off, "k_text": unseen, "v_text": unseen, "k_own": unread, "v_own": unread}
    inputs |= {name: inputs[name].masked_fill(where, torch.nan) for name, where in poisoned.items()}
    got = in_both_orders(lambda: thought_decode(**inputs, **options, backend="cuda"))
    assert_close_as_plain(got, plain, truth, f"decode {what} {shape} {options}")


def sample(kernels) -> None:
    """Vocabularies that end inside a group, a block and a step, in one chunk and in several."""
    generator = torch.Generator().manual_seed(1)
    dtypes, biases = itertools.cycle([torch.float32, torch.bfloat16, torch.float16]), itertools.cycle([True, False])
    with emulated.serving(kernels):
        for V, options in itertools.product((1, 333, 1500), SAMPLE_OPTIONS):
            options = options | {"seed": 5, "banned": [i for i in options.get("banned", ()) if i < V - 1]}
            inputs = sample_inputs(generator, 20, 8, V, next(biases), next(dtypes))
            want, _ = sample_token(**inputs, **options, backend="reference")
            for logits in (20 * 128, 20 * 512, 2**22):  # in a chunk
                with mock.patch.object(cuda_sample_token, "LOGITS", logits):
                    ids, logprob = in_both_orders(lambda: sample_token(**inputs, **options, backend="cuda"))  # noqa: B023
                assert ids.equal(want), f"sample {V} {options} {logits}"
            tensors = [inputs[name] for name in ("hidden", "weight", "bias")]
            options["temperature"] = options.get("temperature", 1.0) or 1.0
            del options["seed"]
            plain, truth = (
                plain_log_softmax(*(x if x is None else x.to(dtype) for x in tensors), **options).gather(1, want[:, None])
                for dtype in (torch.float32, torch.float64)
            )
            assert_close_as_plain(logprob[:, None], plain, truth, f"log-probability {V} {options}")


PARTS = {"decode": decode, "sample": sample}


if __name__ == "__main__":
    kernels = emulated.load(Path(sys.argv[1]))
    for part in sys.argv[2:] or PARTS:
        PARTS[part](kernels)
