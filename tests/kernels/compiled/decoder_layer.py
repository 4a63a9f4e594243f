"""The ops of a decoder layer: rows from narrow to the widest, heads as models have them, with all options and without."""

import functools

import torch

from quietstar_kernels.triton import gated_activation as gated
from quietstar_kernels.triton import rms_norm as norm
from quietstar_kernels.triton import rotary

HGMMA = {}  # see thought_attention.py
NO_MATRIX = {"_norm", "_norm_backward", "_gated", "_gated_backward", "_turn", "_turn_back"}
# Whose numbers of rows one compile serves: with a step apart, and both activations of one gate and of two.
COMPILES = {"bfloat16 D=4096": {}, "bfloat16 K=128": {"_turn": 2}, "bfloat16 I=11008": {"_gated": 4, "_gated_backward": 4}}
HEADS = {64: (9, 3), 96: (32, 32), 128: (32, 8), 256: (8, 4)}  # H and G by K
make = functools.partial(torch.empty, device="meta")


def launches(target, thorough):
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for D in (64, 576, 2048, 4096, 5120, 8192, 16384):
            yield f"{name} D={D}", functools.partial(norms, dtype, D, 512, False)
            yield f"{name} D={D} delta", functools.partial(norms, dtype, D, 512, True)
        for K in HEADS:
            yield f"{name} K={K}", functools.partial(turns, dtype, K, 512, False)
            yield f"{name} K={K} norms", functools.partial(turns, dtype, K, 512, True)
        for I in (100, 11008):  # noqa: E741
            yield f"{name} I={I}", functools.partial(gates, dtype, I, 512)
    for rows in (1, 1000):
        yield "bfloat16 D=4096", functools.partial(norms, torch.bfloat16, 4096, rows, False)
        yield "bfloat16 K=128", functools.partial(turns, torch.bfloat16, 128, rows, False)
        yield "bfloat16 I=11008", functools.partial(gates, torch.bfloat16, 11008, rows)


def norms(dtype, D, rows, with_delta):
    """With a delta as under autocast, x and weight are fp32, but for an fp32 delta."""
    x, weight = (make(shape, dtype=torch.float32 if with_delta else dtype) for shape in ((rows, D), D))
    delta = make(rows, D, dtype=dtype) if with_delta else None
    total, out, rstd = norm.rms_norm(x, delta, weight, 1e-6, 0.0, dtype)
    norm.rms_norm_backward(out, x if with_delta else None, total, rstd, weight, 0.0, dtype, True)


def turns(dtype, K, rows, with_norms):
    """Merged, and as a step of decoding; with norms separate too."""
    H, G = HEADS[K]
    cos, qkv, weights = make(2, 1, rows, K), make(2, rows, (H + 2 * G) * K, dtype=dtype), [None, None]
    if with_norms:
        weights = [make(K, dtype=dtype)] * 2
    options = *weights, 1e-6, 0.0
    grads = rotary.rotary(qkv, None, *cos, H, G, *options)
    saved = (qkv, None) if with_norms else (None, None)
    rotary.rotary_backward(*grads, *cos, *saved, *options, True)
    own, step = make(2, 2, G, rows, 14, K, dtype=dtype), make((), dtype=torch.int32)
    rotary.rotary_decode(qkv, None, None, *cos, H, G, *own, step, *options)
    if with_norms:
        q, k = make(2, rows, H * K, dtype=dtype), make(2, rows, G * K, dtype=dtype)
        grads = rotary.rotary(q, k, *cos, H, G, *options)
        rotary.rotary_backward(*grads, *cos, q, k, *options, True)


def gates(dtype, I, rows):  # noqa: E741
    for gate, up in ((make(rows, 2 * I, dtype=dtype), None), (make(rows, I, dtype=dtype), make(rows, I, dtype=dtype))):
        for activation in ("silu", "gelu_tanh"):
            grad = gated.gated_activation(gate, up, activation)
            gated.gated_activation_backward(grad, gate, up, activation)
