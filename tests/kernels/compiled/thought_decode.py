"""thought_decode: every width of the tables with all options, for the sizes of training and generation; trees of 128.

For sm_90, which has tiles of their own for them, also without options, and trees of every width; thoroughly, also keys and
values of different widths.
"""

import functools

import torch

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.triton.thought_decode import thought_decode

HGMMA = {"_decode": 3}  # see thought_attention.py
COMPILES = {"bfloat16 K=64": {}, "bfloat16 K=64 window, softcap, sinks": {}}  # with more sizes, which one compile serves
NO_MATRIX = {"_add_parts"}

SIZES = [{}, {"C": 1, "L": 4096, "heads": 1}]
MORE_SIZES = [{"L": 1, "C": 1, "S": 1, "heads": 1, "groups": 1}, {"B": 3, "L": 100, "C": 14, "S": 12}]
MORE_SIZES += [{"heads": heads, "C": 256 * heads} for heads in (1, 2, 3, 8, 16, 71)] + [
    {"L": 16, "C": 256, "S": 16, "groups": 16}
]
OPTIONS = {  # window, softcap, sinks, whether on a tree
    "": (None, None, False, False),
    "window, softcap, sinks": (64, 30.0, True, False),
    "on a tree": (None, None, False, True),
    "window, softcap, sinks, on a tree": (64, 30.0, True, True),
}
WIDTHS = [(64, 64), (128, 128), (256, 256)]  # K, E


def launches(target, thorough):
    everything, tree = list(OPTIONS)[1::2]
    for widths in WIDTHS:
        for name in OPTIONS if target == "sm_90" else [everything, tree] if widths == (128, 128) else [everything]:
            yield from cases(torch.bfloat16, *widths, name)
        yield from cases(torch.float32, *widths, everything)
    if thorough:
        yield from cases(torch.bfloat16, 192, 128, everything)


def cases(dtype, K, E, name):
    label = " ".join(filter(None, [str(dtype).removeprefix("torch."), f"K={K}", "" if E == K else f"E={E}", name]))
    for sizes in SIZES + MORE_SIZES * (label in COMPILES):
        yield label, functools.partial(decode, dtype, K, E, OPTIONS[name], **sizes)


def decode(dtype, K, E, options, B=1, L=256, C=512, S=14, groups=2, heads=4, step=torch.int32):
    """``heads`` is H/G. C = 1 makes so few tiles that the text is split into parts."""
    window, softcap, sinks, is_tree = options
    make = functools.partial(torch.empty, dtype=dtype, device="meta")
    lo, table, tree = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in [(B, L), (B, C, 3), (B, C, 4)])
    return thought_decode(
        make(B, groups * heads, C, K),
        make(B, groups, L, K),
        make(B, groups, L, E),
        make(B, groups, C, S, K),
        make(B, groups, C, S, E),
        lo,
        table,
        torch.empty((), dtype=step, device="meta"),
        AttentionOptions(K**-0.5, window, softcap, make(groups * heads) if sinks else None),
        tree if is_tree else None,
    )
