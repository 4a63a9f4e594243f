"""FSDP2: weights, gradients and moments cut over the processes, and whole again for a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from quietstar.config import TrainConfig
from quietstar.hf.modules import unwrapped
from quietstar.model import QuietStar

COMPUTE = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_strategy(config: TrainConfig) -> str:
    """What ``config.sharding`` says, or else the FSDP section of Accelerate's configuration, which arrives as variables.

    Raises:
        ValueError: a section for FSDP1, or one that loads weights in one process alone.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return config.sharding
    version = int(os.environ.get("FSDP_VERSION", 1))
    if version != 2:
        raise ValueError(f"train: fsdp_version must be 2 in Accelerate's configuration, got {version}")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
        raise ValueError("train: fsdp_cpu_ram_efficient_loading must be false in Accelerate's configuration, got true")
    if config.sharding != "no":
        return config.sharding
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    return "shard_grad_op" if again == "false" else "full_shard"


def shard(qs: QuietStar, strategy: str, precision: str) -> None:
    """Cut the weights of ``qs`` in place: a group for each decoder layer, one for each head, one for the rest.

    The rest has the embeddings and the LM head, whose weight the operations take as it is: it must be whole where they run.
    Layers, vectors and embeddings are gathered in the precision of the computation; gradients are summed in fp32.

    Args:
        strategy: full_shard gathers a layer's weights each time it runs; shard_grad_op once a step.
        precision: no, bf16 or fp16.

    Raises:
        ValueError: trainable weights of several dtypes.
    """
    if precision != "no":
        for weight in qs.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in qs.parameters() if weight.requires_grad})
    if len(dtypes) > 1:
        raise ValueError(
            f"train: sharding needs trainable weights of one dtype, got {' and '.join(dtypes)}: "
            "train in float32, with precision bf16 for less memory"
        )
    again = strategy == "full_shard"
    # Autocast casts what comes in; the log-probabilities that do are not to be cast.
    policy = MixedPrecisionPolicy(COMPUTE[precision], torch.float32 if precision != "no" else None, cast_forward_inputs=False)
    names = set(unwrapped(qs.model)._no_split_modules or [])
    for module in list(qs.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mp_policy=policy, reshard_after_forward=again)
            if again:
                module.register_forward_hook(_cut_again)
    for head in (qs.mixing_head, qs.gate):
        if head is not None:
            fully_shard(head, reshard_after_forward=again)
    fully_shard(qs, mp_policy=policy)
    for method in ("think", "choose_anchors"):  # run the model outside of ``forward``
        register_fsdp_forward_method(qs, method)


def _cut_again(layer: nn.Module, *_: Any) -> None:
    """FSDP leaves a layer whole that runs within a backward, for where it is checkpointed its own backward is next. Where a
    chunk of anchors is computed again all layers run first, and would be whole together.
    """
    if not getattr(layer, "gradient_checkpointing", False):
        cast(FSDPModule, layer).reshard()


@contextmanager
def whole_weights(qs: QuietStar, main: bool) -> Iterator[None]:
    """Inside, the main process has whole weights on the CPU in the place of its shards, so that they save as any others.

    Every process must take part. Nothing happens to weights that are not cut.
    """
    for module in qs.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the last group whole
    shards = [
        (module, name, weight)
        for module in qs.modules()
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(weight, DTensor)
    ]
    gathered: dict[int, nn.Parameter] = {}
    for _, _, weight in shards:
        if id(weight) not in gathered:
            gathered[id(weight)] = nn.Parameter(gather(weight, main), requires_grad=weight.requires_grad)
    try:
        if main:
            for module, name, weight in shards:
                module._parameters[name] = gathered[id(weight)]
        yield
    finally:
        for module, name, weight in shards:
            module._parameters[name] = weight


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut over the processes, whole in each."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor, main: bool) -> Tensor:
    """The same, on the CPU of the main process alone: the others get an empty one."""
    tensor = whole(tensor.detach())
    return tensor.cpu() if main else tensor.new_empty(0, device="cpu")


def cut_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor as the weight is cut; every process has the tensor, so nothing is sent."""
    if not isinstance(weight, DTensor) or tensor.shape != weight.shape:
        return tensor
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
