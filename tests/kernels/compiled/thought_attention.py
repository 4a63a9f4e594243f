"""thought_attention, forward and backward: every table entry with all options, trees at a width of 128; for sm_90, which is
measured, also trees at every width, and no options in 16 bits.

Several lengths share a label, since one compile serves them.
"""

import functools
import itertools

import torch

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.branches import Branches
from quietstar_kernels.triton.thought_attention import thought_attention, thought_attention_backward

# Kernels with products of warp groups on sm_90, and how many of their loops, from the first, should read ahead.
HGMMA = {"attention_forward": 2, "attention_backward_queries": 2, "attention_backward_text_keys": 1}
# All loops with products of the kernels in Gluon, each once for each warp group.
HGMMA |= (GLUON := {"gluon_attention_forward": 4, "gluon_attention_text_keys": 2})
# Barriers of a group in its longest loop. Where rows that add nothing are made 0, which most turns pass over, there are two.
GROUP_BARRIERS = {"gluon_attention_forward": 2, "gluon_attention_text_keys": 2 + 2}
# Here products wait for each other with all tiles that were tried; larger ones spill with Triton 3.9.
SERIAL = {"attention_backward_queries bfloat16 K=192 E=80"}
# Words that the fastest tiles on an H200 spill, and a loop that two more programs on a multiprocessor hide the copies of.
# Wide heads on a tree spill with Triton 3.6; with smaller tiles products wait for each other.
SPILLS = {
    "sm_90": {"attention_backward_queries": 26, "attention_backward_text_keys": 24, "attention_backward_own_keys": 34}
    | {"attention_forward bfloat16 K=256 E=256 on a tree": 10}
    | {"attention_forward bfloat16 K=256 E=256 window, softcap, sinks, on a tree": 18}
}
WAITS = {"attention_forward bfloat16 K=64 E=64"}
# Labels whose sizes one compile serves, or two: long branches have tiles of their own.
COMPILES = {
    "bfloat16 K=64 E=64": {"attention_backward_own_keys": 2},
    "bfloat16 K=64 E=64 window, softcap, sinks": {"attention_backward_own_keys": 2},
    "bfloat16 K=64 E=64 on a tree": {"attention_backward_own_keys": 2},
    "bfloat16 K=64 E=64 window, softcap, sinks, on a tree": {"attention_backward_own_keys": 2},
}
NO_MATRIX = {"attention_rows", "attention_ranges", "attention_backward_sum"}

SIZES = [  # B, L, C, rows of a branch, G, H/G; the last has long branches, and enough of them
    (1, 1, 1, 1, 1, 1),
    (2, 16, 32, 12, 1, 4),
    (8, 256, 512, 14, 8, 1),
    (1, 1000, 3000, 33, 2, 7),
    (1, 2048, 16, 1111, 8, 4),
]
SHORT = (8, 256, 512, 14, 8, 4)
OPTIONS = {"": (None, None, False), "window, softcap, sinks": (64, 30.0, True)}
TREE = "on a tree"
WIDTHS = [(64, 64), (128, 128), (256, 256)]  # K, E


def launches(target, thorough):
    everything = list(OPTIONS.items())[1]
    for widths in WIDTHS:
        yield from cases(torch.bfloat16, widths, *everything)
        yield from cases(torch.float32, widths, *everything)
        if target == "sm_90" or widths == (128, 128):
            yield from cases(torch.bfloat16, widths, f"{everything[0]}, {TREE}", everything[1])
        if target == "sm_90":  # the others have the same tiles without options
            yield from cases(torch.bfloat16, widths, "", OPTIONS[""])
            yield from cases(torch.bfloat16, widths, TREE, OPTIONS[""])
    if thorough:
        yield from cases(torch.bfloat16, (192, 80), "", OPTIONS[""])


def gluon_launches():
    """The code of the kernels in Gluon does not depend on sizes. Beside them, own keys of short branches have other tiles."""
    options = {"window": (64, None, False), "softcap, sinks": (None, 30.0, True), **OPTIONS}
    kinds = [*options.items(), *((", ".join(filter(None, [name, TREE])), OPTIONS[name]) for name in OPTIONS)]
    for widths, kind in itertools.product(WIDTHS[:2], kinds):
        yield from cases(torch.bfloat16, widths, *kind, [SHORT])
    yield from cases(torch.float16, WIDTHS[1], *kinds[-1], [SHORT])


def cases(dtype, widths, name, options, all_sizes=SIZES):
    label = " ".join(filter(None, [str(dtype).removeprefix("torch."), "K={} E={}".format(*widths), name]))
    for sizes in all_sizes:
        yield label, functools.partial(forward, dtype, widths, options, name.endswith(TREE), *sizes)
        yield label, functools.partial(backward, dtype, widths, options, name.endswith(TREE), *sizes)


def inputs(dtype, widths, options, is_tree, B, L, C, rows, G, HG):
    """q, k, v as transposed views of [B,M,heads,width], and the other arguments."""
    shapes = (B, L), (B, C, 3), (B, C * rows), (B, C, 4), (B, C * rows, 2)
    *tables, tree, path = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in shapes)
    branches = Branches(*tables, bool(L % 2), *([tree, path] if is_tree else []))
    heads = [(G * HG, widths[0]), (G, widths[0]), (G, widths[1])]
    q, k, v = (torch.empty(B, branches.M, *x, dtype=dtype, device="meta").transpose(1, 2) for x in heads)
    window, softcap, has_sinks = options
    sinks = torch.empty(G * HG, device="meta") if has_sinks else None
    return (q, k, v), (branches, AttentionOptions(0.1, window, softcap, sinks))


def forward(*case):
    tensors, rest = inputs(*case)
    thought_attention(*tensors, *rest)


def backward(*case):
    (q, k, v), rest = inputs(*case)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device="meta")
    lse = torch.empty(q.shape[:3], device="meta")
    grad_lse = None if rest[1].sinks is None else lse
    thought_attention_backward(out, q, k, v, out, lse, *rest, grad_lse)
