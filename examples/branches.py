"""The mask: attention over a prompt and many completions of it, with the prompt there once and no mask in memory.

A completion's row sees the prompt and its own completion up to itself. The same is computed in two other ways, which give the
same numbers: with the prompt repeated for each completion, and with a dense mask.

    python examples/branches.py
"""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from quietstar_kernels import ThoughtLayout, thought_attention

PROMPT, HEADS, KV_HEADS, WIDTH = 512, 8, 2, 64
torch.manual_seed(0)

# The layout: a few small integers. Each completion hangs on the prompt's last token, and has a length of its own.
lengths = torch.randint(16, 65, (1, 16))
anchors = torch.full_like(lengths, PROMPT - 1)
layout = ThoughtLayout.packed(anchors, lengths, text_length=PROMPT)
rows = layout.M  # the prompt's, then those of the completions
q, k, v = (torch.randn(1, heads, rows, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))


def packed() -> torch.Tensor:
    return thought_attention(q, k, v, layout)  # the one line that a model needs


def repeated() -> torch.Tensor:
    """One causal pass for each completion, over a copy of the prompt."""
    found, end = [], PROMPT
    for length in lengths[0].tolist():
        text = [torch.cat([x[:, :, :PROMPT], x[:, :, end : end + length]], 2) for x in (q, k, v)]
        out = scaled_dot_product_attention(*text, is_causal=True, enable_gqa=True)
        found += [out[:, :, PROMPT:]] if found else [out]  # the prompt's own rows once
        end += length
    return torch.cat(found, 2)


def masked() -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask()[:, None], enable_gqa=True)


def seconds(way) -> float:
    way()
    began = time.perf_counter()
    for _ in range(5):
        way()
    return (time.perf_counter() - began) / 5


times, expected = {way: seconds(way) for way in (packed, repeated, masked)}, repeated()
print(f"{PROMPT} rows of a prompt, {rows - PROMPT} rows of {lengths.shape[1]} completions")
for way, spent in times.items():
    difference = float((way() - expected).abs().max())
    print(f"{way.__name__:<9} {1000 * spent:6.1f} ms  {spent / times[packed]:5.1f} times  differs by at most {difference:.0e}")
