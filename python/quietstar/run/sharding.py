"""FSDP2: weights, gradients and moments sharded over the processes, and gathered for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from quietstar.hf import adapters
from quietstar.hf.modules import sharding_group, unwrapped
from quietstar.model import QuietStar

COMPUTE = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARDS = ("think", "choose_anchors", "generate")  # methods that run the model outside of ``forward``
_freed: WeakSet[nn.Module] = WeakSet()  # models of which full_shard reshards all groups after each forward


def shard(qs: QuietStar, strategy: str, precision: str) -> None:
    """Shard the weights of ``qs`` in place, with one group for each decoder layer, one for each head and one for the rest.

    The rest has the embeddings and the LM head. The operations take the LM head's weight as a tensor, so it must be gathered
    while they run. Layers, vectors and embeddings are gathered in the precision of the computation; gradients are summed in
    fp32.

    Args:
        strategy: full_shard gathers a layer's weights each time it runs, shard_grad_op once per step.
        precision: no, bf16 or fp16.
    """
    if qs.base_model is not None and adapters.there(qs.model):  # they share weights, which FSDP wants in one group
        raise ValueError("train: base_model must be 'frozen' or 'current' for adapters with sharding, got 'ema'")
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
    reshard = strategy == "full_shard"
    # Autocast already casts inputs, and the log-probabilities among them must not be cast.
    policy = MixedPrecisionPolicy(COMPUTE[precision], torch.float32 if precision != "no" else None, cast_forward_inputs=False)
    layers = set(unwrapped(qs.model)._no_split_modules or [])
    for module in list(qs.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mp_policy=policy, reshard_after_forward=reshard)
            if reshard:
                module.register_forward_hook(_reshard, with_kwargs=True)
    for head in (qs.mixing_head, qs.gate):
        if head is not None:
            fully_shard(head, reshard_after_forward=reshard)
    if reshard:
        _freed.add(qs.model)
    fully_shard(qs, mp_policy=policy)
    for name in FORWARDS:
        setattr(type(qs), name, _as_forward(getattr(QuietStar, name)))


def _as_forward(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method with FSDP's hooks around it, which ``forward`` has anyway.

    Unlike ``register_fsdp_forward_method`` it serves copies by ``with_config``, too.
    """

    @wraps(method)
    def call(self: QuietStar, *args: Any, **kwargs: Any) -> Any:
        vars(self)["forward"] = partial(method, self)
        try:
            return self(*args, **kwargs)
        finally:
            del vars(self)["forward"]

    return call


@contextmanager
def gathered(qs: QuietStar) -> Iterator[None]:
    """In this context each process has the whole language model, in the precision of the computation.

    Thoughts, evaluation and generation then need no other process, unless rewards compare with a copy of the model, which stays
    sharded. All processes must enter, and compute nothing with gradients inside. Weights that are whole already stay as they
    are.
    """
    if sharding_group(qs.model) is None:
        yield
        return
    _as_forward(lambda self: None)(qs)  # gathers what is in no group below
    parts = [part for part in (qs.model, qs.mixing_head, qs.gate) if part is not None]
    groups = [module for part in parts for module in part.modules() if isinstance(module, FSDPModule)]
    freed = groups if qs.model in _freed else []
    try:
        for group in freed:
            group.set_reshard_after_forward(False, recurse=False)
        for group in groups:
            group.unshard()
        yield
    finally:
        for group in freed:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


def _reshard(layer: nn.Module, inputs: tuple, options: dict[str, Any], _: Any) -> None:
    """Reshards a layer after its forward.

    FSDP does not do this during a backward: with gradient checkpointing, the layer's own backward comes next. But when a chunk
    of anchors is recomputed, all layers run first and would be gathered together. A layer whose input has no gradient, as the
    first one of a model with adapters, stays as it is: to FSDP its backward ends with that of all chunks.
    """
    ends = any(isinstance(x, Tensor) and x.requires_grad for x in (*inputs, *options.values()))
    if ends and not getattr(layer, "gradient_checkpointing", False):
        cast(FSDPModule, layer).reshard()


@contextmanager
def whole_weights(qs: QuietStar, main: bool) -> Iterator[None]:
    """In this context the main process has whole weights on the CPU in place of its shards, so that they can be saved as usual.

    Every process must take part. Weights that are not sharded stay as they are.
    """
    for module in qs.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the last group gathered
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
    """The whole of a tensor that may be sharded, in each process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor, main: bool) -> Tensor:
    """The whole of a tensor that may be sharded, on the CPU of the main process; the others get an empty tensor."""
    tensor = whole(tensor.detach())
    return tensor.cpu() if main else tensor.new_empty(0, device="cpu")
