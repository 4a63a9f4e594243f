"""sample_token: few rows and many, on each path to the weights; with many rows in bf16 each option."""

import functools

import torch

from quietstar_kernels._options import Head
from quietstar_kernels.triton.sample_token import sample_token

SIZES = [(65, 1, 1, 0), (100, 64, 128, 1), (128, 100, 1000, 16), (4096, 4096, 151936, 2**40), (70, 3, 9, -2)]  # R, D, V, seed
COMPILES = {"bfloat16 R from 65": {}}  # see thought_attention.py
HGMMA = {"_draw": 1}  # see thought_attention.py
NO_MATRIX = {"_choose"}

OPTIONS = {  # bias, scale, softcap, temperature, banned
    "": (False, None, None, 1.0, []),
    "bias, banned": (True, None, None, 0.7, [3]),
    "softcap": (True, 0.5, 30.0, 1.0, []),
    "greedy": (False, None, None, 0.0, []),
    "greedy, softcap": (True, None, 30.0, 0.0, [3]),
}


def launches(target, thorough):
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 64, 5000):
            for name in OPTIONS if dtype == torch.bfloat16 and rows == 5000 else ["", "softcap"]:
                label = " ".join(filter(None, [str(dtype).removeprefix("torch."), f"R={rows}", name]))
                yield label, functools.partial(draw, dtype, rows, 4096, OPTIONS[name])
    for R, D, V, seed in SIZES:
        yield "bfloat16 R from 65", functools.partial(draw, torch.bfloat16, R, D, OPTIONS[""], V, seed)


def draw(dtype, R, D, options, V=128_256, seed=-5):
    has_bias, *rest = options
    hidden, weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in [(R, D), (V, D), V])
    counters = torch.empty(R, 4, dtype=torch.int32, device="meta")
    seed = torch.full((), seed, dtype=torch.int64, device=hidden.device)
    return sample_token(hidden, Head(weight, bias if has_bias else None, *rest), counters, seed)
