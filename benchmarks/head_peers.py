"""What draws tokens from a language-model head, or gives log-probabilities under it, without our ops.

Sampling: functions of hidden [R,D] and weight [V,D] that return ids [R] and their log-probabilities [R]. Log-probabilities:
functions of hidden, weight and targets that return the sum of the targets' negative ones, a loss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from case import Work
from machine import package_version
from peers import Peer, not_installed

Sampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _multinomial(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T).float().log_softmax(-1)
    ids = torch.multinomial(logp.exp(), 1)
    return ids[:, 0], logp.gather(1, ids)[:, 0]


def _race(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest exponential variate over its probability wins: multinomial without its checks and its sorting."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    p = logp.exp()
    ids = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
    return ids[:, 0], logp.gather(1, ids)[:, 0]


def _matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


def _logits(count: int) -> Callable[[Any], Work]:
    """Memory of so many tensors of R·V fp32 numbers."""
    return lambda case: Work(case.work().flops, count * 4 * case.R * case.V)


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def _liger(case: Any) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _cut_cross_entropy(case: Any) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, reduction="sum")


def _pytorch(case: Any) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda *operands: F.linear_cross_entropy(*operands, reduction="sum", options=options)


def _no_pytorch(case: Any) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"PyTorch {torch.__version__} has no chunked linear_cross_entropy"


def _trl(case: Any) -> Loss:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())[0].sum()

    return loss


def _no_trl(case: Any) -> str | None:
    """TRL's trainers call it with these arguments through ``trl.trainer.utils.add_fused_lm_head``."""
    if (reason := not_installed("trl")) or importlib.util.find_spec("trl.kernels"):
        return reason
    return f"trl {package_version('trl')} has no chunked log-probabilities"


def _for_gpu(package: str) -> Callable[[Any], str | None]:
    def why_not(case: Any) -> str | None:
        return not_installed(package) or (None if case.device.type == "cuda" else f"{package} is for GPUs")

    return why_not


SAMPLERS = [
    Peer("matmul, softmax, multinomial", lambda case: _multinomial, needs=_logits(4)),
    Peer("matmul, softmax, exponential race", lambda case: _race, needs=_logits(5)),
    Peer("the matmul alone", lambda case: _matmul, needs=_logits(1), is_floor=True),
]
LOSSES = [
    Peer("matmul, cross_entropy", lambda case: _plain_loss, needs=_logits(4)),
    Peer("PyTorch linear_cross_entropy, chunked", _pytorch, why_not=_no_pytorch),
    Peer("TRL chunked log-probabilities", _trl, "trl", _no_trl),
    Peer("Liger fused linear cross entropy", _liger, "liger-kernel", _for_gpu("liger-kernel")),
    Peer("cut-cross-entropy", _cut_cross_entropy, "cut-cross-entropy", _for_gpu("cut-cross-entropy")),
]
