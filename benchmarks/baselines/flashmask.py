"""FlashMask, attention whose mask is an interval of hidden rows for each key (PaddlePaddle/FlashMask, arXiv 2410.01359).

A key of the text is hidden from the branches before the first one whose anchor sees it, and a branch's own key from all rows
after the branch. So a text with branches in the order of their anchors is a causal mask with one such interval for each key.
There is no wheel: who builds it from source has ``flash_mask``. The PyTorch interface of version 4 was not at hand; this call
is what its README and the Paddle interface have in common.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.baselines.packed import Attention
from benchmarks.harness.candidate import Candidate
from benchmarks.harness.case import Case
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.branches import ANCHOR, LENGTH, START


def hidden_rows(layout: ThoughtLayout) -> Tensor:
    """int32 [B,1,M,2]: the first row from which on, and the one up to which, rows below the diagonal don't see a key."""
    branches, L, M = layout.branches, layout.L, layout.M
    anchor, start, length = (branches.table[..., x].long() for x in (ANCHOR, START, LENGTH))  # [B,C]
    t = torch.arange(L, device=anchor.device).expand(layout.B, L).contiguous()
    first = torch.searchsorted(anchor.contiguous(), t)  # of the branches whose anchor sees a text key
    to = torch.cat([L + start, torch.full_like(start[:, :1], M)], 1).gather(1, first)
    own = (L + start + length).gather(1, branches.of_row.long())
    found = [torch.cat([torch.full_like(to, L), own], 1), torch.cat([to, torch.full_like(own, M)], 1)]
    return torch.stack(found, -1)[:, None].int()


def flashmask(case: Case) -> Attention:
    from flash_mask.cute.interface import flashmask_attention

    rows = hidden_rows(case.layout)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        swapped = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out = flashmask_attention(*swapped, startend_row_indices=rows, causal=True)
        return (out if isinstance(out, Tensor) else out[0]).transpose(1, 2)

    return attend


def no_flashmask(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "this kernel is for GPUs"
    if find_spec("flash_mask") is None:
        return "flash_mask is not installed here, and there is no wheel of it"
    layout = case.layout
    anchors = layout.branches.table[..., ANCHOR]
    if layout.own != "causal" or bool(layout.lo.any()) or bool((anchors.diff(dim=1) < 0).any()):
        return "absent branches, several documents, or rows that see later ones take more than an interval for each key"
    return None


FLASHMASK = Candidate("FlashMask", flashmask, "flash-mask", no_flashmask, compiles=True)
