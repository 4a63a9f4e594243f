"""What samples tokens from a language-model head, or computes log-probabilities under it, without our ops."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.candidate import Candidate, not_installed
from benchmarks.harness.case import Case, Work
from benchmarks.harness.machine import package_version
from quietstar.hf.linear import OneDNNLinear
from quietstar_kernels.cpu import products

Product = Callable[[Tensor, Tensor], Tensor]  # hidden [R,D], weight [V,D]: logits [R,V]
Sampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # hidden [R,D], weight [V,D]: ids [R], their log-probabilities [R]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets [R]: the sum of the negative log-probabilities

VLLM_SAMPLER = "v1/worker/gpu/sample/gumbel.py"


@dataclass(frozen=True, kw_only=True)
class HeadCase(Case):
    """R rows of width D under a head of V tokens."""

    size_names = ("R", "D", "V")
    R: int
    D: int
    V: int


def _matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


def _one_dnn(hidden: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = OneDNNLinear.apply(hidden, weight, None)
    return product


def _no_one_dnn(case: Case) -> str | None:
    """Why what sends its products to oneDNN has no row of its own: oneDNN must be faster, as ``products`` decides for ours."""
    if case.device.type != "cpu" or case.dtype != torch.float32:
        return "oneDNN takes the place of MKL, on CPUs in fp32"
    return None if products.library() == "onednn" else "PyTorch's matmul is not slower here"


def _multinomial(hidden: Tensor, weight: Tensor, product: Product = _matmul) -> tuple[Tensor, Tensor]:
    logp = product(hidden, weight).float().log_softmax(-1)
    ids = torch.multinomial(logp.exp(), 1)
    return ids[:, 0], logp.gather(1, ids)[:, 0]


def _race(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The id with the smallest exponential variate divided by its probability: multinomial without its checks and sorting."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    p = logp.exp()
    ids = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
    return ids[:, 0], logp.gather(1, ids)[:, 0]


def _vllm(case: HeadCase) -> Sampler:
    """vLLM's sampling kernel, over logits in fp32, as its sampler has them."""
    gumbel_sample = _vllm_module().gumbel_sample
    row = torch.arange(case.R, dtype=torch.int32, device=case.device)
    temperature, seed = torch.ones(case.R, device=case.device), row.long()

    def sample(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = (hidden @ weight.T).float()
        ids = gumbel_sample(logits, row, temperature, seed, seed, apply_temperature=False, is_drafting=False)
        return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    return sample


def _vllm_file() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders if (path := Path(folder) / VLLM_SAMPLER).exists()), None)


def _vllm_module() -> ModuleType:
    """The file by itself, which needs Triton alone: its package imports a library that is built for one PyTorch."""
    import triton

    vllm, utilities = ModuleType("vllm"), ModuleType("vllm.triton_utils")
    utilities.triton, utilities.tl = triton, triton.language  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("vllm_sampler", _vllm_file() or "")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"vllm": vllm, "vllm.triton_utils": utilities}):
        spec.loader.exec_module(module)
    return module


def _no_vllm(case: HeadCase) -> str | None:
    if case.device.type != "cuda":
        return "this kernel is for GPUs"
    return None if _vllm_file() else f"there is no {VLLM_SAMPLER} of vLLM here"


def _logits(count: int) -> Callable[[HeadCase], Work]:
    """The memory of ``count`` tensors [R,V] in fp32."""
    return lambda case: Work(case.work().flops, count * 4 * case.R * case.V)


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, product: Product = _matmul) -> Tensor:
    return F.cross_entropy(product(hidden, weight).float(), targets, reduction="sum")


def _liger(case: HeadCase) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _liger_scaled(case: HeadCase) -> Loss:
    """On Hopper by CuTe."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as scaled

    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # which waits for the device
    return lambda hidden, weight, targets: scaled.apply(hidden, weight, targets).sum()


def _liger_hopper(case: HeadCase) -> Loss:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90 as loss

    return lambda hidden, weight, targets: loss(hidden, weight, targets, -100, "sum")


def _quack(case: HeadCase) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def _for_hopper(package: str, module: str, rows: int = 1, ids: int = 1) -> Callable[[HeadCase], str | None]:
    """For what is written in CuTe and takes rows and ids in multiples."""

    def why_not(case: HeadCase) -> str | None:
        if reason := _for_gpu(package)(case) or not_installed("nvidia-cutlass-dsl"):
            return reason
        if torch.cuda.get_device_capability(case.device) != (9, 0):
            return "it is for Hopper"
        try:  # a module's folder is imported to find it
            found = importlib.util.find_spec(module)
        except ImportError as error:
            return f"{module} can't be imported: {error}"
        if found is None:
            return f"{package} {package_version(package)} has no {module}"
        if case.R % rows or case.V % ids:
            return f"it takes rows by {rows} and ids by {ids}"
        return None

    return why_not


def _cut_cross_entropy(case: HeadCase) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, reduction="sum")


def _chunked(case: HeadCase) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda *operands: F.linear_cross_entropy(*operands, reduction="sum", options=options)


def _no_chunked(case: HeadCase) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"PyTorch {torch.__version__} has no chunked linear_cross_entropy"


def _trl(case: HeadCase) -> Loss:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())[0].sum()

    return loss


def _no_trl(case: HeadCase) -> str | None:
    """Why TRL can't run here. Its trainers call it as ``_trl`` does, through ``trl.trainer.utils.add_fused_lm_head``."""
    if (reason := not_installed("trl")) or importlib.util.find_spec("trl.kernels"):
        return reason
    return f"trl {package_version('trl')} has no chunked log-probabilities"


def _for_gpu(package: str) -> Callable[[HeadCase], str | None]:
    def why_not(case: HeadCase) -> str | None:
        return not_installed(package) or (None if case.device.type == "cuda" else f"{package} is for GPUs")

    return why_not


SAMPLERS = [
    Candidate("matmul, softmax, multinomial", lambda case: _multinomial, needs=_logits(4)),
    Candidate(
        "matmul by oneDNN, softmax, multinomial",
        lambda case: partial(_multinomial, product=_one_dnn),
        why_not=_no_one_dnn,
        needs=_logits(4),
    ),
    Candidate("matmul, softmax, exponential race", lambda case: _race, needs=_logits(5)),
    Candidate("matmul, vLLM's Gumbel sampler", _vllm, "vllm", _no_vllm, needs=_logits(4), compiles=True),
    Candidate("the matmul alone", lambda case: _matmul, needs=_logits(1), is_partial=True),
]
LOSSES = [
    Candidate("matmul, cross_entropy", lambda case: _plain_loss, needs=_logits(4)),
    Candidate(
        "matmul by oneDNN, cross_entropy",
        lambda case: partial(_plain_loss, product=_one_dnn),
        why_not=_no_one_dnn,
        needs=_logits(4),
    ),
    Candidate("PyTorch linear_cross_entropy, chunked", _chunked, why_not=_no_chunked),
    Candidate("TRL chunked log-probabilities", _trl, "trl", _no_trl),
    Candidate("Liger fused linear cross entropy", _liger, "liger-kernel", _for_gpu("liger-kernel")),
    Candidate(
        "Liger scaled cross entropy, CuTe",
        _liger_scaled,
        "liger-kernel",
        _for_hopper("liger-kernel", "liger_kernel.ops.fused_linear_scaled_cross_entropy"),
    ),
    Candidate(
        "Liger fused linear cross entropy, CuTe",
        _liger_hopper,
        "liger-kernel",
        _for_hopper("liger-kernel", "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", 128, 256),
    ),
    Candidate("Quack chunked linear cross entropy, CuTe", _quack, "quack-kernels", _for_hopper("quack-kernels", "quack")),
    Candidate("cut-cross-entropy", _cut_cross_entropy, "cut-cross-entropy", _for_gpu("cut-cross-entropy")),
]
