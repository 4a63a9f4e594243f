"""linear_logprob: its kernels run between matrix products of the vendor's library, and have none themselves.

They read fp32 logits. So other dtypes of a model change only what is kept and the gradient, which they write.
"""

import functools

import torch

from quietstar_kernels._options import Head, Saved
from quietstar_kernels.triton.linear_logprob import linear_logprob, linear_logprob_backward

HGMMA: dict[str, int] = {}
NO_MATRIX = {"_online_softmax", "_logits_gradient"}

SHAPES = [(1, 1, 1), (2, 3, 64), (17, 16, 1000), (5000, 4096, 152_064)]  # R, D, V: one compile serves them all
# See thought_attention.py. Not float32: there the largest logits are more than 2 GiB, for which AMD's compiler makes a kernel
# that addresses them in another way.
COMPILES = {"bfloat16": {}, "bfloat16 softcap entropy kept": {}}
OPTIONS = {"": (None, None, 1.0, []), "softcap": (0.5, 30.0, 0.7, [3])}  # scale, softcap, temperature, banned
CASES = [  # dtype, name of options, entropy, whether logits are kept
    (torch.bfloat16, "", False, False),
    (torch.bfloat16, "", False, True),
    (torch.bfloat16, "softcap", True, False),
    (torch.bfloat16, "softcap", True, True),
    (torch.float32, "softcap", True, True),
]


def launches(target, thorough):
    for dtype, option, entropy, keep in CASES:
        words = (str(dtype).removeprefix("torch."), option, "entropy" if entropy else "", "kept" if keep else "")
        for R, D, V in SHAPES:
            yield " ".join(filter(None, words)), functools.partial(run, R, D, V, dtype, OPTIONS[option], entropy, keep)


def run(R, D, V, dtype, rest, entropy, keep):
    hidden, weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in [(R, D), (V, D), V])
    targets = torch.empty(R, dtype=torch.int64, device="meta")
    given = hidden, Head(weight, bias, *rest[:3], [token for token in rest[3] if token < V]), targets
    logprob, *saved = linear_logprob(*given, entropy, keep)
    grads = logprob, logprob if entropy else None
    linear_logprob_backward(*grads, *given, Saved(*saved), [True] * 3)
